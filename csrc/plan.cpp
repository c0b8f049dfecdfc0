#include "plan.h"

namespace relpos {
namespace {

constexpr int kBlocksPerSm = 2;                            // hide one block's prologue behind the other's stream
constexpr int64_t kBlockLogits = 1 << 16;                  // beyond these, a block of the forward has a strip of rows
constexpr int64_t kMaxOffset = (int64_t{1} << 31) - 4096;  // of an element within a block's slab

}  // namespace

SharedLimits shared_limits(int arch) {
  constexpr int64_t kKiB = 1024;
  switch (arch) {
    case 80:
    case 87:
      return {163 * kKiB, 164 * kKiB};
    case 90:
    case 100:
    case 103:
      return {227 * kKiB, 228 * kKiB};
    default:
      return {99 * kKiB, 100 * kKiB};  // 86, 89, 120, 121
  }
}

std::string LogitsPlan::kernel(Direction direction) const {
  if (!refusal.empty()) return "none";
  const std::string name = direction == Direction::kForward ? "logits_fwd" : "logits_bwd";
  return name + (tensor_cores ? "_mma" : "_simt");
}

LogitsPlan plan_logits(Direction direction, const Shape& s, int q_bytes, int arch) {
  const bool forward = direction == Direction::kForward;
  const bool fits_tensor_cores = q_bytes == 2 && s.D % 8 == 0 && (forward || s.D <= kMaxProductD);
  const SharedLimits limits = shared_limits(arch);
  LogitsPlan plan;
  for (const bool tensor_cores : {true, false}) {  // long factors: fewer rows fit without tensor cores
    if (tensor_cores && !fits_tensor_cores) continue;
    plan.tensor_cores = tensor_cores;
    plan.factor_ld = round_up(s.factors(), 4) + 4;
    plan.q_ld = tensor_cores ? round_up(s.D, 16) + 8 : round_up(s.D, 4);
    const auto bytes = [&](int rows) {
      return forward ? forward_shared(rows, plan.factor_ld, plan.q_ld, tensor_cores).total
                     : backward_shared(s, rows, plan.factor_ld, plan.q_ld, tensor_cores).total;
    };
    const int least = tensor_cores ? 16 : 1;
    plan.block_rows = 64;
    while (forward && plan.block_rows > kStripMma && plan.block_rows * s.N() > kBlockLogits) plan.block_rows /= 2;
    while (plan.block_rows > least && bytes(plan.block_rows) + kReservedPerBlock > limits.per_sm / kBlocksPerSm)
      plan.block_rows /= 2;
    plan.shared_bytes = bytes(plan.block_rows);
    if (plan.shared_bytes <= limits.per_block) break;
  }
  plan.grid = ceil_div<int64_t>(s.rows(), plan.block_rows);
  if (plan.shared_bytes > limits.per_block)
    plan.refusal = "the factors of one query, " + std::to_string(s.factors()) + " floats, exceed shared memory";
  else if (plan.block_rows * s.N() > kMaxOffset || s.rows() > kMaxOffset || index_length(s) > kMaxOffset)
    plan.refusal = "S_k = " + std::to_string(s.N()) + ", " + std::to_string(s.rows()) + " rows: beyond 32-bit offsets";
  return plan;
}

}  // namespace relpos
