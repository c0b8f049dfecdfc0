#include "plan.h"

namespace relpos {
namespace {

struct Limits {
  int64_t per_block, per_sm;  // bytes of shared memory
};

Limits limits_of(int arch) {
  constexpr int64_t kKiB = 1024;
  switch (arch) {
    case 80:
    case 87: return {163 * kKiB, 164 * kKiB};
    case 90:
    case 100:
    case 103: return {227 * kKiB, 228 * kKiB};
    default: return {99 * kKiB, 100 * kKiB};  // 86, 89, 120, 121
  }
}

constexpr int64_t kReservedPerBlock = 1024;
constexpr int kBlocksPerSm = 2;  // hide one block's prologue behind the other's stream
constexpr int64_t kMaxOffset = (int64_t{1} << 31) - 4096;  // of an element within a block's slab

}  // namespace

std::string LogitsPlan::kernel(Direction direction) const {
  if (!refusal.empty()) return "none";
  const std::string name = direction == Direction::kForward ? "logits_fwd" : "logits_bwd";
  return name + (tensor_cores ? "_mma" : "_simt");
}

LogitsPlan plan_logits(Direction direction, const Shape& s, int q_bytes, bool aligned, int arch) {
  LogitsPlan plan;
  const bool forward = direction == Direction::kForward;
  plan.tensor_cores = q_bytes == 2 && s.D % 8 == 0 && aligned && (forward || s.D <= kMaxProductD);
  plan.factor_ld = round_up(s.factors(), 4) + 4;
  plan.q_ld = !plan.tensor_cores ? round_up(s.D, 4) : forward ? round_up(s.D, 16) + 8 : s.D + 8;
  const auto bytes = [&](int rows) {
    return forward ? forward_shared(rows, plan.factor_ld, plan.q_ld, plan.tensor_cores).total
                   : backward_shared(s, rows, plan.factor_ld, plan.q_ld, plan.tensor_cores).total;
  };
  const Limits limits = limits_of(arch);
  const int least = plan.tensor_cores ? 16 : 1;
  int rows = 64;
  while (rows > least && bytes(rows) + kReservedPerBlock > limits.per_sm / kBlocksPerSm) rows /= 2;
  if (bytes(rows) > limits.per_block && plan.tensor_cores)  // long factors: fewer rows fit without tensor cores
    return plan_logits(direction, s, q_bytes, false, arch);

  if (bytes(rows) > limits.per_block) {
    plan.refusal = "the factors of one query, " + std::to_string(s.factors()) + " floats, exceed shared memory";
  } else if (rows * s.N() > kMaxOffset || s.rows() > kMaxOffset) {
    plan.refusal = "S_k = " + std::to_string(s.N()) + ", " + std::to_string(s.rows()) + " rows: beyond 32-bit offsets";
  }
  plan.block_rows = rows;
  plan.grid = ceil_div<int64_t>(s.rows(), rows);
  plan.shared_bytes = bytes(rows);
  return plan;
}

}  // namespace relpos
