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
  int tiles = 0;          // of a span
  int columns = 0;        // of a span, a multiple of 8
  int spans = 0;
  int line_of[kMaxKeyBlocks] = {}, column_of[kMaxKeyBlocks] = {};  // of every block; unused ones are past the span

  int padded_lines = 0;  // of all tiles of a span
  int class_tiles = 0;   // of class tokens, before the lines
  int staged = 0;        // factors per query that pass through shared memory, floats

  RELPOS_HD int keys() const { return blocks * 8; }
};
KeyTiling tile_keys(const Shape& s, int bytes, int most_blocks);
KeyTiling tile_keys(const Shape& s, int bytes);  // of all kernels but the forward of windows

#ifndef RELPOS_MOST_HEAD_DIM  // less: fewer kernels, for tests that compile them many times
#define RELPOS_MOST_HEAD_DIM 128
#endif
constexpr int kMostHeadDim = RELPOS_MOST_HEAD_DIM;
constexpr bool kFewKernels = kMostHeadDim <= 64;  // and fewer widths of tiles, then

// The head dimension of the kernel that takes D; 0 if none does.
constexpr int kernel_head_dim(int D, int bytes) {
  if (D > kMostHeadDim || D % 8) return 0;
  return D <= 64 ? 64 : bytes == 4 && D > 96 ? 128 : round_up(D, 16);
}

// Blocks of keys at most in a tile of a kernel; float32 takes more shared memory per block.
constexpr int most_key_blocks(int bytes, int D) { return bytes == 2 ? kMaxKeyBlocks : D <= 64 ? 4 : 2; }

// Strips of 16 rows that stay with a warp, of the forward or of the keys: two share what passes.
constexpr int strips_of(int bytes, int D) { return bytes == 2 && D <= 80 ? 2 : 1; }

// Where a block of queries, or of slots of keys, works: first .. first + count - 1 of one group.
struct BlockPlace {
  int group, batch, head, first, count;
};
// A part of the keys: columns first .. first + columns - 1 of every line; or class tokens, up to a tile of them.
struct Span {
  bool of_lines;
  int number, first, columns, tiles;
  int line_factors;  // those of its first tile begin there
};
struct SpanRows : Span {
  const void *k, *v;  // of the group
  // Of every row of a tile: its token of the group, were the tile the first, and its line of the tile; -1: none.
  int token[kMaxKeyBlocks * 8];
  int8_t line[kMaxKeyBlocks * 8];
};
// The place of a block and the rows of a span live in shared memory: in registers they would be in the way of the
// products for as long as they last.
constexpr int64_t kPlaceBytes = 32, kSpanBytes = 368;
static_assert(sizeof(BlockPlace) <= kPlaceBytes && sizeof(SpanRows) <= kSpanBytes);

// Elements from one row of a tile in shared memory to the next.
RELPOS_HD constexpr int tile_ld(int D, int bytes) { return D + 16 / bytes; }
// The same of float32 in three parts of bfloat16, side by side.
RELPOS_HD constexpr int split_ld(int D) { return 3 * D + 8; }

// Floats from the line gradients of one key to the next: lanes that read a query's are in different banks.
RELPOS_HD constexpr int dlines_ld(int block_rows) { return block_rows + 1; }

struct Coordinates {  // of a query; -1: it has no bias
  int of[kAxes];
};

enum class AttentionKernel {
  kForward,
  kForwardWindow,
  kForwardSm90,
  kBackwardQueries,
  kBackwardQueriesSm90,
  kBackwardKeys,
  kBackwardKeysSm90,
  kBackwardWindow
};

struct AttentionPlan {
  std::string refusal;  // why no kernel takes the problem; empty if one does
  KeyTiling keys;
  int head_dim = 0;    // of the kernel
  int block_rows = 0;  // queries, or slots of keys, of a block
  int threads = 0;
  int64_t grid = 0;
  int64_t shared_bytes = 0;
  int stages = kKeyStages;    // of what passes
  bool whole_tables = false;  // in shared memory; of windows

  std::string kernel(AttentionKernel which) const;
};

// bytes: of an element of q; arch: 80, 86, 90, ...
AttentionPlan plan_attention(AttentionKernel kernel, const Shape& s, int bytes, int arch, double scale);

}  // namespace relpos
