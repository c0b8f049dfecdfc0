// rows.cuh - which queries a tile of consecutive rows of the logits holds, which table rows queries use, and which keys
// use a table row.
#pragma once
#include "../../params.h"
#include "ptx.cuh"

namespace relpos {

// Every thread below `count` locates one row. The planner refuses more rows than an int can count.
__device__ __forceinline__ void locate_rows(const LogitsParams& p, int64_t first_row, int count, RowOfTile* rows) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    int m, head;
    const int group = p.by_m.divide(static_cast<int>(first_row) + i, m), batch = p.by_heads.divide(group, head);
    RowOfTile r;
    p.grid.locate(m - p.shape.prefix, r.coordinate);
    r.padding = 0;
    r.q_offset = batch * p.q.batch + head * p.q.head + m * p.q.row;
    rows[i] = r;
  }
}

// The first 32 KiB of a tile of the logits, or of their gradient, are on their way while nobody can use them yet.
template <typename S>
__device__ __forceinline__ void prefetch_rows(const LogitsParams& p, const void* logits, int64_t first_row, int count) {
  constexpr int kLine = 128 / sizeof(S);
  const int64_t at = static_cast<int64_t>(threadIdx.x) * kLine;
  if (at < count * p.shape.N()) prefetch_l2(static_cast<const S*>(logits) + first_row * p.shape.N() + at);
}

// The table row of query coordinate c and key i of an axis.
__device__ __forceinline__ int row_of(const Axis& axis, const int32_t* index, int c, int i) {
  if (axis.k_shift < 0) return index[axis.index + c * axis.keys + i];
  return axis.origin + c * axis.origin_step - (i << axis.k_shift);
}

template <typename T>
__device__ __forceinline__ const T* table_row(const void* table, const Shape& s, int l) {
  return static_cast<const T*>(table) + uint64_t{static_cast<uint32_t>(l)} * static_cast<uint32_t>(s.D);
}

// Of a query coordinate; one below 0 has no keys.
__device__ __forceinline__ int origin_of(const Axis& axis, int c) {
  return c < 0 ? -1 : axis.origin + c * axis.origin_step;
}

// key[i]: that for which the query coordinate with origin(i) uses table row l(i); if there is none, something outside
// of 0 .. keys - 1. `high`: the last row that counts; keys of those past it lie before those that count, or outside.
// What must be looked up is asked for at once. `of`: an axis, or what has a k_shift as an axis has.
template <int COUNT, typename Rows, typename Origin, typename L>
__device__ __forceinline__ void find_keys(const Rows& of, const int32_t* index, int high, int (&key)[COUNT],
                                          Origin&& origin, L&& l) {
  if (of.k_shift < 0) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) key[i] = (origin(i) >= 0) & (l(i) <= high) ? index[origin(i) + l(i)] : -1;
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    // As a multiple of the step between keys. What is negative, or no multiple, becomes more than any key, or negative:
    // bits that are shifted out return at the top.
    const auto down = static_cast<unsigned>(origin(i) - l(i));
    key[i] = static_cast<int>(__funnelshift_r(down, down, of.k_shift));
  }
}

// Whether a key is one of begin .. end - 1.
__device__ __forceinline__ bool is_between(int key, int begin, int end) {
  return static_cast<unsigned>(key - begin) < static_cast<unsigned>(end - begin);
}

// ranges[2a], ranges[2a + 1]: lowest and highest table row that the tile's queries use on axis a, 0 and -1 if they use
// none. One warp per axis; table rows grow with the query coordinate and fall with the key.
__device__ __forceinline__ void find_ranges(const Shape& s, const int32_t* index, const RowOfTile* rows, int count,
                                            int* ranges) {
  const int a = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (a >= kAxes) return;
  int low = s.axis[a].queries, high = -1;
  for (int i = lane; i < count; i += 32) {
    const int c = rows[i].coordinate[a];
    if (c < 0) continue;
    low = min(low, c);
    high = max(high, c);
  }
  for (int x = 16; x; x /= 2) {
    low = min(low, __shfl_xor_sync(~0u, low, x));
    high = max(high, __shfl_xor_sync(~0u, high, x));
  }
  if (lane != 0) return;
  int* const range = ranges + 2 * a;
  range[0] = 0, range[1] = -1;
  if (high < 0 || s.axis[a].rows == 0) return;
  range[0] = row_of(s.axis[a], index, low, s.axis[a].keys - 1);
  range[1] = row_of(s.axis[a], index, high, 0);
}

}  // namespace relpos
