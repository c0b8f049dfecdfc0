// plan_attention.h - how the attention kernels cut a problem: host code, no torch, no CUDA; see plan.h.
//
// A tile of keys is up to 8 blocks of 8 neighbouring columns of one image row ("line") each. A line is padded to whole
// blocks, so that no block lies in two lines: its bias is one number per query and line, and 8 per query and column.
//
//   lines of 64 keys:  one line per tile          lines of 14 keys:  four lines per tile, two blocks each
//   lines of 76 keys:  two spans of columns, 40 and 36, one after the other
#pragma once
#include <cstdint>
#include <string>

#include "shapes.h"

namespace relpos {

constexpr int kMostAttentionThreads = 256;
constexpr int kMaxKeyBlocks = 8, kKeyStages = 2;
constexpr int kInnerPad = 4;  // floats between rows of factors that pass through shared memory
constexpr float kLeastScale = 1.f / 512, kMostScale = 512.f;  // the bias is kept divided by it, half precision included

struct KeyTiling {
  int blocks = 0;         // per tile
  bool one_line = false;  // per tile
  int lines = 0;          // per tile
  int columns = 0;        // of a span, a multiple of 8
  int spans = 0;
  int line_of[kMaxKeyBlocks] = {}, column_of[kMaxKeyBlocks] = {};  // of every block; unused ones are past the span

  RELPOS_HD int keys() const { return blocks * 8; }
};
KeyTiling tile_keys(const Shape& s, int bytes);

// The head dimension of the kernel that takes D; 0 if none does.
constexpr int kernel_head_dim(int D) { return D > 128 || D % 8 ? 0 : D <= 64 ? 64 : round_up(D, 16); }

// Strips of 16 queries that a warp of the forward takes: two share the keys they read.
constexpr int strips_of(int bytes, int D) { return bytes == 2 && D <= 96 ? 2 : 1; }

// Elements from one row of a tile in shared memory to the next.
RELPOS_HD constexpr int tile_ld(int D, int bytes) { return D + 16 / bytes; }

struct Coordinates {  // of a query; -1: it has no bias
  int of[kAxes];
};

// Byte offsets of a block's shared memory. Before the keys of a span arrive, their place serves the factors.
struct AttentionFwdShared {
  int64_t rows, q, keys, lines, total;
};
RELPOS_HD inline AttentionFwdShared attention_fwd_shared(const Shape& s, const KeyTiling& tiling, int block_rows, int D,
                                                         int bytes) {
  const int64_t stages = int64_t{2} * kKeyStages * tiling.keys() * tile_ld(D, bytes) * bytes;
  const int64_t inner = int64_t{block_rows} / strips_of(bytes, D) * (tiling.keys() + kInnerPad) * 4;
  AttentionFwdShared at{};
  at.q = at.rows + block_rows * static_cast<int64_t>(sizeof(Coordinates));
  at.keys = at.q + int64_t{block_rows} * tile_ld(D, bytes) * bytes;
  at.lines = at.keys + (stages > inner ? stages : inner);
  at.total = at.lines + int64_t{s.axis[kT].factors() + s.axis[kH].factors()} * block_rows * bytes;
  return at;
}

struct AttentionPlan {
  std::string refusal;  // why no kernel takes the problem; empty if one does
  KeyTiling keys;
  int head_dim = 0;    // of the kernel
  int block_rows = 0;  // queries of a block
  int threads = 0;
  int64_t grid = 0;
  int64_t shared_bytes = 0;
};

// bytes: of an element of q; arch: 80, 86, 90, ...
AttentionPlan plan_attention_fwd(const Shape& s, int bytes, int arch, double scale);

}  // namespace relpos
