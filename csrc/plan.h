// plan.h - which kernel, tile and shared memory a problem gets on an architecture: host code, no torch, no CUDA.
//
// The launchers obey the plan and Python reads it (`info`, is_supported, tests), so that it is tested where there is
// no GPU.
#pragma once
#include <cstdint>
#include <string>

#include "shapes.h"

namespace relpos {

constexpr int kThreads = 256;  // of every logits kernel
constexpr int kWarps = kThreads / 32;
constexpr int kStripMma = 16, kStripSimt = 8;  // queries that a warp of the forward takes at once
constexpr int kRunVectors = 4 * 32;            // 16-byte vectors of whole lines that it streams at once
constexpr int kSumBuffer = 512;                // elements a warp of the backward sums at once
constexpr int kSumPadding = 16;                // around them: a vector that begins before, one that ends behind
constexpr int kProductDepth = 32;              // summands that a tensor-core product of the backward stages at once
constexpr int kProductPad = 8;                 // elements that keep ldmatrix free of bank conflicts
constexpr int kMaxProductD = 128;              // head dimensions it takes

struct SharedLimits {
  int64_t per_block, per_sm;  // bytes of shared memory
};
SharedLimits shared_limits(int arch);
constexpr int64_t kReservedPerBlock = 1024;

enum class Direction { kForward, kBackward };

struct LogitsPlan {
  std::string refusal;  // why no kernel takes the problem; empty if one does
  bool tensor_cores = false;
  int block_rows = 0;  // rows of the logits that a block streams
  int factor_ld = 0;   // floats between the factors of two rows in shared memory
  int q_ld = 0;        // elements between two rows of q (backward: of the table) in shared memory
  int64_t grid = 0;
  int64_t shared_bytes = 0;

  std::string kernel(Direction direction) const;
};

// Where a row of the tile is: its coordinates on the query grid (-1: a class token) and its row of q.
struct RowOfTile {
  int coordinate[kAxes];
  int padding;
  int64_t q_offset;
};

// Byte offsets of a block's shared memory; the kernels carve with the same functions.
struct ForwardShared {
  int64_t rows, ranges, factors, q, total;
};
RELPOS_HD inline ForwardShared forward_shared(int block_rows, int factor_ld, int q_ld, bool tensor_cores) {
  ForwardShared at{};
  at.ranges = at.rows + block_rows * static_cast<int64_t>(sizeof(RowOfTile));
  at.factors = round_up<int64_t>(at.ranges + 2 * kAxes * sizeof(int), 16);
  at.q = at.factors + round_up<int64_t>(static_cast<int64_t>(block_rows) * factor_ld * 4, 16);
  at.total = at.q + round_up<int64_t>(static_cast<int64_t>(block_rows) * q_ld * (tensor_cores ? 2 : 4), 16);
  return at;
}

// `sums`, a buffer per warp, and the operands of the product for dq are not alive together: they share their place.
struct BackwardShared {
  int64_t rows, ranges, factors, sums, sums_per_warp, high, low, table, total;
};
RELPOS_HD inline BackwardShared backward_shared(const Shape& s, int block_rows, int factor_ld, int q_ld,
                                                bool tensor_cores) {
  BackwardShared at{};
  at.ranges = at.rows + block_rows * static_cast<int64_t>(sizeof(RowOfTile));
  at.factors = round_up<int64_t>(at.ranges + 2 * kAxes * sizeof(int), 16);
  at.sums = at.high = at.factors + round_up<int64_t>(static_cast<int64_t>(block_rows) * factor_ld * 4, 16);
  at.sums_per_warp = (kSumBuffer + kSumPadding + (s.axis[kT].rows ? round_up(s.outer_keys(), 4) : 0)) * 4;
  at.low = at.high + static_cast<int64_t>(block_rows) * (kProductDepth + kProductPad) * 2;
  at.table = at.low + static_cast<int64_t>(block_rows) * (kProductDepth + kProductPad) * 2;
  const int64_t sums_end = at.sums + kWarps * at.sums_per_warp, product_end = at.table + kProductDepth * q_ld * 2;
  at.total = tensor_cores && product_end > sums_end ? product_end : sums_end;
  return at;
}

// q_bytes: of an element of q; arch: 80, 86, 90, ...
LogitsPlan plan_logits(Direction direction, const Shape& s, int q_bytes, int arch);

}  // namespace relpos
