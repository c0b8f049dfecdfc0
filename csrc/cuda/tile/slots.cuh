// slots.cuh - the slots of keys that stay with a block of the backward, and where their factors are in a stage.
#pragma once
#include "tokens.cuh"

namespace relpos {

// The slots of a block, and where the factors of each block of 8 of them are in a stage.
struct SlotBlock {
  KeySlots slots;
  int first, first_line, first_column, lines;  // columns in blocks of 8
  bool all_columns;                            // of a line are in a stage, else those of the block in order

  __device__ __forceinline__ SlotBlock(const AttentionParams& p, int first, int block_keys)
      : slots(p.shape), first(first), all_columns(slots.line <= block_keys) {
    const int last = min(first + block_keys, static_cast<int>(slots.count(p.shape))) - 8;
    first_line = line_of(first);
    lines = line_of(last) - first_line + 1;
    first_column = all_columns ? 0 : max(first - slots.prefix, 0) % slots.line / 8;
  }
  __device__ __forceinline__ bool has_bias(int slot) const { return slot >= slots.prefix; }
  // Row of the factors of lines.
  __device__ __forceinline__ int line_of(int slot) const {
    return has_bias(slot) ? slots.prefix_lines + (slot - slots.prefix) / slots.line : 0;
  }
  // Which of the stage's blocks of columns a slot of a line is in.
  __device__ __forceinline__ int column_block(int slot) const {
    return all_columns ? (slot - slots.prefix) % slots.line / 8 : (slot - max(first, slots.prefix)) / 8;
  }
  // The first column of such a block: of this line or the next.
  __device__ __forceinline__ int column(int block) const {
    const int column = (first_column + block) * 8;
    return column < slots.line ? column : column - slots.line;
  }
  // The token of a slot, or -1.
  __device__ __forceinline__ int token(const Shape& s, int slot) const {
    if (!has_bias(slot)) return slot < s.prefix ? slot : -1;
    const int line = (slot - slots.prefix) / slots.line, j = (slot - slots.prefix) % slots.line;
    return line < s.outer_keys() && j < s.axis[kW].keys ? s.prefix + line * s.axis[kW].keys + j : -1;
  }
};

// What is the same for the whole block: in shared memory, for in registers it would be in the way of the products.
struct KeysBlock {
  BlockPlace place;
  SlotBlock slots;
  int M;
  const void *q, *grad, *columns;   // of the group
  const float *lines, *statistics;  // of the block's lines, and behind those of all lines

  template <typename T>
  __device__ __forceinline__ void fill(const AttentionBwdParams& p) {
    find_place(p, static_cast<int>(KeySlots(p.shape).count(p.shape)), place);
    slots = SlotBlock(p, place.first, p.block_rows);
    M = static_cast<int>(p.shape.M());
    q = rows_of<T>(place, p.q), grad = rows_of<T>(place, p.grad);
    columns = static_cast<const Factor<T>*>(p.columns) + int64_t{place.group} * M * slots.slots.line;
    const int64_t queries = padded_queries(p.shape), all = slots.slots.lines(p.shape);
    const float* group = p.lines + place.group * (all + statistics_of(sizeof(T))) * queries;
    lines = group + slots.first_line * queries;
    statistics = group + all * queries;
  }
};
static_assert(sizeof(KeysBlock) <= kKeysBlockBytes);

// Starts copies of the keys of a block's slots, or their values, by all threads; zeros where there is none.
template <typename Rows>
__device__ __forceinline__ void copy_slots(const Rows& to, const AttentionParams& p, const InRows& from,
                                           const KeysBlock& block) {
  const auto* data = rows_of<typename Rows::Element>(block.place, from);
  copy_rows(to, p.block_rows, p.shape.D, threadIdx.x, blockDim.x, data, [&](int row) {
    const int n = block.slots.token(p.shape, block.slots.first + row);
    return n >= 0 ? data + n * from.row : nullptr;
  });
}

// Where the factors of a tile of queries begin that the two blocks of 8 keys of each strip take.
template <int STRIPS>
struct KeyBlocks {
  bool of_line[STRIPS][2];
  int columns[STRIPS][2], lines[STRIPS][2];

  // From key `first` of the block on; `queries`: of a tile.
  __device__ __forceinline__ KeyBlocks(const AttentionParams& p, const SlotBlock& block, int first, int queries) {
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = block.first + first + s * 16 + half * 8;
        of_line[s][half] = block.has_bias(slot) && slot < block.slots.count(p.shape);
        columns[s][half] = of_line[s][half] ? block.column_block(slot) * 8 : 0;
        lines[s][half] = min(block.line_of(slot) - block.first_line, block.lines - 1) * queries;
      }
  }
  __device__ __forceinline__ bool has_bias(int s, int half) const { return of_line[s][half]; }
  __device__ __forceinline__ int column(int s, int half) const { return columns[s][half]; }
  __device__ __forceinline__ int line(int s, int half) const { return lines[s][half]; }
};

// The gradients of a warp's strips of keys, through its own rows, `first` and on, of a tile; token(slot of the block)
// is -1 if there is none. No barrier comes before: a lane overwrites what it alone has read, as the operand a, or a
// strip that the barrier of another has freed.
template <typename Rows, int STRIPS, typename F>
__device__ __forceinline__ void store_slots(const AttentionParams& p, const OutRows& to,
                                            const float (&d)[STRIPS][Rows::kD / 8][4], float factor, const Rows& rows,
                                            int first, const BlockPlace& place, F&& token) {
  using T = typename Rows::Element;
  if (to.data == nullptr) return;
  T* data = rows_of<T>(place, to);
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
    const auto results = in_place_of(rows, first + s * 16);
    put_strip(results, first + s * 16, d[s], factor);
    store_rows(results, first + s * 16, 16, p.shape.D, [&](int row) {
      const int n = token(row);
      return n >= 0 ? data + n * to.row : nullptr;
    });
  }
}

}  // namespace relpos
