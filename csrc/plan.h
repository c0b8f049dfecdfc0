// plan.h - which kernel, tile and shared memory a problem gets on an architecture: host code, no torch, no CUDA.
//
// The launchers obey the plan and Python reads it (`info`, is_supported, tests), so that it is tested where there is
// no GPU.
#pragma once
#include <cstdint>
#include <string>

#include "shapes.h"

namespace relpos {

constexpr int kThreads = 256;     // of every logits kernel
constexpr int kWarps = kThreads / 32;
constexpr int kSumBuffer = 512;   // elements a warp of the backward sums at once
constexpr int kSumPadding = 16;   // around them: a vector that begins before, one that ends behind

enum class Direction { kForward, kBackward };

struct LogitsPlan {
  std::string refusal;     // why no kernel takes the problem; empty if one does
  bool tensor_cores = false;
  int block_rows = 0;      // rows of the logits that a block streams
  int factor_ld = 0;       // floats between the factors of two rows in shared memory
  int q_ld = 0;            // elements between two rows of q in shared memory, forward only
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

// Byte offsets of a block's shared memory; the kernels carve with the same function.
struct LogitsShared {
  int64_t rows, ranges, factors, q, buffers, total;
};
RELPOS_HD inline LogitsShared logits_shared(Direction direction, const Shape& s, int block_rows, int factor_ld,
                                            int q_ld, int q_bytes) {
  LogitsShared at{};
  at.rows = 0;
  at.ranges = at.rows + block_rows * static_cast<int64_t>(sizeof(RowOfTile));
  at.factors = at.ranges + 32;
  at.q = at.factors + round_up<int64_t>(static_cast<int64_t>(block_rows) * factor_ld * 4, 16);
  if (direction == Direction::kForward) {
    at.buffers = at.total = at.q + round_up<int64_t>(static_cast<int64_t>(block_rows) * q_ld * q_bytes, 16);
  } else {
    const int outer = s.axis[kT].rows ? round_up(s.outer_keys(), 4) : 0;
    at.buffers = at.q;
    at.total = at.buffers + kWarps * static_cast<int64_t>(kSumBuffer + kSumPadding + outer) * 4;
  }
  return at;
}

// bytes of an element of q and of the logits; arch: 80, 86, 90, ...
LogitsPlan plan_logits(Direction direction, const Shape& s, int q_bytes, int logits_bytes, bool q_rows_aligned,
                       int arch);

}  // namespace relpos
