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

}  // namespace

std::string LogitsPlan::kernel(Direction direction) const {
  if (!refusal.empty()) return "none";
  const std::string name = direction == Direction::kForward ? "logits_fwd" : "logits_bwd";
  return name + (tensor_cores ? "_mma" : "_simt");
}

LogitsPlan plan_logits(Direction direction, const Shape& s, int q_bytes, int logits_bytes, bool q_rows_aligned,
                       int arch) {
  LogitsPlan plan;
  const bool forward = direction == Direction::kForward;
  plan.tensor_cores = forward && q_bytes == 2 && s.D % 8 == 0 && q_rows_aligned;
  plan.factor_ld = round_up(s.factors(), 4) + 4;
  plan.q_ld = !forward ? 0 : plan.tensor_cores ? round_up(s.D, 16) + 8 : round_up(s.D, 4);
  const int q_tile_bytes = plan.tensor_cores ? 2 : 4;
  const Limits limits = limits_of(arch);
  const int least = plan.tensor_cores ? 16 : 1;
  const auto bytes = [&](int rows) {
    return logits_shared(direction, s, rows, plan.factor_ld, plan.q_ld, q_tile_bytes).total;
  };
  int rows = 64;
  while (rows > least && bytes(rows) + kReservedPerBlock > limits.per_sm / kBlocksPerSm) rows /= 2;
  if (bytes(rows) > limits.per_block && plan.tensor_cores && s.rows() > 0) {
    return plan_logits(direction, s, q_bytes, logits_bytes, false, arch);  // long factors: one row fits without mma
  }
  if (bytes(rows) > limits.per_block) {
    plan.refusal = "the factors of one query, " + std::to_string(s.factors()) + " floats, exceed shared memory";
    return plan;
  }
  if (rows * s.N() > (int64_t{1} << 31) - 4096) {
    plan.refusal = "S_k = " + std::to_string(s.N()) + " is too long for the kernels' 32-bit offsets within a block";
    return plan;
  }
  // A block's slab must start at a whole 16-byte vector, whatever S_k is.
  const int slab = 16 / logits_bytes;
  if (rows < slab && s.N() % slab != 0 && forward) {
    plan.refusal = "rows of " + std::to_string(s.N()) + " logits are too long and not a whole number of vectors";
    return plan;
  }
  plan.block_rows = rows;
  plan.grid = ceil_div<int64_t>(s.rows(), rows);
  plan.shared_bytes = bytes(rows);
  return plan;
}

}  // namespace relpos
