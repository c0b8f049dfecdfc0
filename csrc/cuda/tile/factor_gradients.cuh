// factor_gradients.cuh - of a warp's strip of 16 queries: what its factors got, written for the table gradient, and its
// share of dq.
#pragma once
#include "factors.cuh"

namespace relpos {

// Of the line factors of all queries of a block: [lines, block rows].
struct LineGradients {
  float* data;
  int ld;

  __device__ __forceinline__ float& at(int line, int row) const { return data[line * ld + row]; }
  // Of one key of an axis: the sum over the lines that have it.
  __device__ __forceinline__ float of_axis(const Shape& s, int a, int key, int row) const {
    const int keys_h = s.axis[kH].keys, step = a == kT ? 1 : keys_h, count = a == kT ? keys_h : s.axis[kT].keys;
    const float* first = &at(a == kT ? key * keys_h : key, row);
    float sum = 0.f;
#pragma unroll 1
    for (int i = 0; i < count; ++i, first += step * ld) sum += *first;
    return sum;
  }
};

// A row of 16 on its way to a tile, of which a pair of lanes has every other chunk; zeros past its width.
template <typename T, int D>
struct HeldRow {
  static constexpr int kChunk = Tile<T, D>::kChunk, kCount = Tile<T, D>::kChunks / 2;
  uint4 chunks[kCount];

  __device__ __forceinline__ static int element(int i) { return (2 * i + static_cast<int>(threadIdx.x) % 2) * kChunk; }
  __device__ __forceinline__ static uint4 chunk(const T* row, int width, int i) {
    return element(i) < width ? *reinterpret_cast<const uint4*>(row + element(i)) : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ void load(const T* row, int width) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) chunks[i] = chunk(row, width, i);
  }
  __device__ __forceinline__ void put(T* row) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) *reinterpret_cast<uint4*>(row + element(i)) = chunks[i];
  }
  // With the registers of one chunk.
  __device__ __forceinline__ static void copy(const T* row, int width, T* to) {
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) *reinterpret_cast<uint4*>(to + element(i)) = chunk(row, width, i);
  }
};

// <grad[m], out[m]> of query lane / 2 of a strip; 0 where there is none. AT_ONCE chunks of each are asked for at once.
template <typename T, int D, int AT_ONCE = HeldRow<T, D>::kCount>
__device__ __forceinline__ float find_delta(const AttentionBwdParams& p, const BlockPlace& block, int first) {
  using Row = HeldRow<T, D>;
  const int row = first + static_cast<int>(afresh(threadIdx.x % 32 / 2));
  float sum = 0.f;
  if (row < block.count) {
    const T* grad = rows_of<T>(block, p.grad) + static_cast<int64_t>(block.first + row) * p.grad.row;
    const T* out = rows_of<T>(block, p.out) + static_cast<int64_t>(block.first + row) * p.out.row;
#pragma unroll 1
    for (int begin = 0; begin < Row::kCount; begin += AT_ONCE) {
      uint4 of_grad[AT_ONCE], of_out[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        of_grad[i] = Row::chunk(grad, p.shape.D, begin + i);
        of_out[i] = Row::chunk(out, p.shape.D, begin + i);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        float x[kVector<T>], y[kVector<T>];
        unpack<T>(of_grad[i], x);
        unpack<T>(of_out[i], y);
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) sum = fmaf(x[e], y[e], sum);
      }
    }
  }
  return sum + __shfl_xor_sync(~0u, sum, 1);
}

// dq += x, a step of 16, times rows `row` .. of a tile. Half precision: what rounding takes away of x counts, too.
template <typename T, int D>
__device__ __forceinline__ void add_rows(float (&dq)[1][D / 8][4], float (&x)[2][4], const Tile<T, D>& rows, int row,
                                         int width) {
  constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
  OperandA<T> parts[kParts];
  parts[0].set(x[0], x[1]);
  if constexpr (kParts == 2) {
    parts[0].leave_rest(x[0], x[1]);
    parts[1].set(x[0], x[1]);
  }
#pragma unroll
  for (int d = 0; d < D / 8; d += 2) {
    if (ends_before<T>(d, width)) break;
    OperandB<T> columns[2];
    load_straight(columns, rows, row, d);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      multiply(dq[0][d], parts[i], columns[0]);
      multiply(dq[0][d + 1], parts[i], columns[1]);
    }
  }
}

// dq += d_a / scale times the table rows of axis a and these keys; gradient(row of the strip, key) is d_a. AHEAD: there
// are registers for the rows of the next step.
template <bool AHEAD, typename T, int D, typename F>
__device__ __forceinline__ void add_table_products(const AttentionParams& p, int a, const KeyRange& keys,
                                                   const Coordinates* rows, int first, const Tile<T, D>& table_rows,
                                                   float (&dq)[1][D / 8][4], F&& gradient) {
  const int lane = threadIdx.x % 32;
  const UsedRows used(p, a, keys, rows + first);
  if (used.last < 0) return;
  HeldRow<T, D> held;  // not by cp.async: other warps have brought most rows to L1
  const auto load = [&](int i0) { held.load(used.row<T>(p, i0 + lane / 2), p.shape.D); };
  if constexpr (AHEAD) load(0);
  for (int i0 = 0; i0 <= used.last; i0 += 16) {
    __syncwarp();  // the tile may be overwritten
    if constexpr (AHEAD) {
      held.put(table_rows.at(lane / 2, 0));
      load(i0 + 16);
    } else {
      held.copy(used.row<T>(p, i0 + lane / 2), p.shape.D, table_rows.at(lane / 2, 0));
    }
    float x[2][4];
    int key[8];
    used.find_keys(p.index, key, i0);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool counts = is_between(key[i], keys.begin, keys.end);
      x[i / 4][i % 4] = counts ? gradient(lane / 4 + i % 4 / 2 * 8, key[i]) * p.inverse_scale : 0.f;
    }
    __syncwarp();  // the rows are there
    add_rows(dq, x, table_rows, 0, p.shape.D);
  }
}

// Writes what the factors of a strip got, for keys first_key .. first_key + count - 1 of an axis; gradient(row, i).
template <typename F>
__device__ __forceinline__ void write_factors(const AttentionBwdParams& p, const BlockPlace& block, int first, int a,
                                              int first_key, int count, F&& gradient) {
  const int64_t row0 = block.group * p.shape.M() + block.first + first;
  const int factors = p.shape.factors(), rows = min(16, block.count - first);
  float* const of_axis = p.dfactors + row0 * factors + p.shape.axis[a].factor + first_key;
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    float* to = of_axis + i;
#pragma unroll 4
    for (int row = 0; row < rows; ++row, to += factors) *to = gradient(row, i);
  }
  __syncwarp();  // gradients may be overwritten
}

// The line gradients of a strip: written, and their share of dq added. `stage`: the warp's own.
template <bool AHEAD, typename T, int D>
__device__ __forceinline__ void end_lines(const AttentionBwdParams& p, const BlockPlace& block, const Coordinates* rows,
                                          int first, const LineGradients& dlines, float* stage,
                                          const Tile<T, D>& table_rows, float (&dq)[1][D / 8][4]) {
  const int row = threadIdx.x % 16, part = threadIdx.x % 32 / 16;
#pragma unroll 1
  for (int a = kT; a < kW; ++a) {
    const KeyRange all{0, p.shape.axis[a].keys};
    if (p.shape.axis[a].rows == 0) continue;
    LineGradients of_axis{dlines.data + first, dlines.ld};
    if (p.shape.axis[kT].rows) {  // else each line is a key
      of_axis = {stage, 16};
      for (int key = part; key < all.end; key += 2) of_axis.at(key, row) = dlines.of_axis(p.shape, a, key, first + row);
      __syncwarp();
    }
    const auto gradient = [&](int row, int key) { return of_axis.at(key, row); };
    if (p.dfactors) write_factors(p, block, first, a, 0, all.end, gradient);
    add_table_products<AHEAD>(p, a, all, rows, first, table_rows, dq, gradient);
  }
}

}  // namespace relpos
