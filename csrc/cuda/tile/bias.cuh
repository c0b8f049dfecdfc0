// bias.cuh - the factors of a tile: factors[m, axis.factor + i] = <q[m], table[index[c(m), i]]>.
//
// Queries of a tile use a short range of table rows on each axis, though each query another window of it. So the
// product of the tile with the whole range is formed, and every element goes to the key that uses that row (rows.cuh):
//
//                table rows l, low .. high
//               +--------------------------+
//   queries m   | . . k2 k1 k0 .  .  .  .  |      k0, k1, ...: the keys of this query
//               | . . .  k2 k1 k0 .  .  .  |      . : computed, not used
//               +--------------------------+
#pragma once
#include "row_steps.cuh"
#include "rows.cuh"

namespace relpos {

struct FactorTile {
  const RowOfTile* rows;
  int count;  // rows of the tile that exist
  float* factors;
  int ld;

  __device__ __forceinline__ int origin(const Axis& axis, int a, int row) const {
    return row < count ? origin_of(axis, rows[row].coordinate[a]) : -1;
  }
};

// Elements of the product to where they belong: value(i) is that of query row(i), with origin(i), and table row l(i).
template <int COUNT, typename Value, typename Row, typename Origin, typename L>
__device__ __forceinline__ void put_factors(const FactorTile& tile, const LogitsParams& p, int a, int high,
                                            Value&& value, Row&& row, Origin&& origin, L&& l) {
  const Axis& axis = p.shape.axis[a];
  int key[COUNT];
  find_keys(axis, p.index, high, key, origin, l);
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (is_between(key[i], 0, axis.keys)) tile.factors[row(i) * tile.ld + axis.factor + key[i]] = value(i);
}

// acc[n] += 16 rows of queries times table rows l0 + 8 n .., elements d .. d + 16 STEPS - 1; a row past `high` counts
// as that one.
template <int STEPS, typename T, int BLOCKS>
__device__ __forceinline__ void add_table_rows(float (&acc)[BLOCKS][4], const LogitsParams& p, const T* q_smem, int l0,
                                               int high, int d) {
  RowSteps<T, STEPS> rows[BLOCKS];
#pragma unroll
  for (int n = 0; n < BLOCKS; ++n) {
    const int l = min(l0 + n * 8 + static_cast<int>(threadIdx.x) % 32 / 4, high);
    rows[n].load(table_row<T>(p.table, p.shape, l), d, p.shape.D);
  }
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    uint32_t q_regs[4];
    load_spread_rows<STEPS>(q_regs, q_smem + d, p.q_ld, step);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) mma_m16n8k16<T>(acc[n], q_regs, rows[n].of_step[step]);
  }
}

// Tensor cores: a warp takes 16 queries and 32 table rows at a time. q is in shared memory, zero past D.
template <typename T>
__device__ __forceinline__ void axis_factors_mma(const FactorTile& tile, const LogitsParams& p, int a, int low,
                                                 int high, const T* q_smem) {
  constexpr int kBlocks = 4;  // of 8 table rows, sharing operands of q
  const Axis& axis = p.shape.axis[a];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int strips = ceil_div(tile.count, 16), spans = ceil_div(high - low + 1, 8 * kBlocks);
  for (int item = warp; item < strips * spans; item += kWarps) {
    const int strip = item % strips, l0 = low + item / strips * 8 * kBlocks;
    const int row = strip * 16 + lane / 4;
    const T* queries = q_smem + strip * 16 * p.q_ld;
    const int origin[2] = {tile.origin(axis, a, row), tile.origin(axis, a, row + 8)};
    float acc[kBlocks][4] = {};
    int d = 0;
#pragma unroll 1
    for (; d + 16 < p.shape.D; d += 32) add_table_rows<2>(acc, p, queries, l0, high, d);
    if (d < p.shape.D) add_table_rows<1>(acc, p, queries, l0, high, d);
    put_factors<kBlocks * 4>(
        tile, p, a, high, [&](int i) { return acc[i / 4][i % 4]; }, [&](int i) { return row + i % 4 / 2 * 8; },
        [&](int i) { return origin[i % 4 / 2]; }, [&](int i) { return l0 + i / 4 * 8 + lane % 4 * 2 + i % 2; });
  }
}

// Without tensor cores: a lane takes one table row and 8 queries at a time. q is in shared memory as float.
template <typename T>
__device__ __forceinline__ void axis_factors_simt(const FactorTile& tile, const LogitsParams& p, int a, int low,
                                                  int high, const float* q_smem) {
  constexpr int kQueries = 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int strips = ceil_div(tile.count, kQueries), spans = ceil_div(high - low + 1, 32);
  const int D = p.shape.D;
  const T* table = static_cast<const T*>(p.table);
  for (int item = warp; item < strips * spans; item += kWarps) {
    const int first = item % strips * kQueries, l = low + item / strips * 32 + lane;
    const T* table_row = table + static_cast<int64_t>(min(l, high)) * D;
    float acc[kQueries] = {};
    for (int d = 0; d < D; d += 4) {
      float t[4];
      load4(table_row + d, D - d, D % 4 == 0, t);
#pragma unroll
      for (int r = 0; r < kQueries; ++r) {
        const int row = min(first + r, tile.count - 1);
        const float4 x = *reinterpret_cast<const float4*>(q_smem + row * p.q_ld + d);
        acc[r] += x.x * t[0] + x.y * t[1] + x.z * t[2] + x.w * t[3];
      }
    }
    put_factors<kQueries>(
        tile, p, a, high, [&](int r) { return acc[r]; }, [&](int r) { return first + r; },
        [&](int r) { return tile.origin(p.shape.axis[a], a, first + r); }, [&](int) { return l; });
  }
}

// As the next function, for tensor cores, where rows of q begin at multiples of 16 bytes.
template <typename T>
__device__ __forceinline__ void stage_queries_by_vectors(const FactorTile& tile, const LogitsParams& p, T* q_smem) {
  constexpr int V = kVector<T>, kUnroll = 3;
  const T* q = static_cast<const T*>(p.q.data);
  const int vectors = p.block_rows * (p.q_ld / V);
  for (int v0 = threadIdx.x; v0 < vectors; v0 += kUnroll * kThreads) {
    uint4 regs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      int in_row;
      const int row = p.by_q_vectors.divide(v0 + u * kThreads, in_row), d = in_row * V;
      const bool exists = row < tile.count && d < p.shape.D;
      regs[u] = exists ? *reinterpret_cast<const uint4*>(q + tile.rows[row].q_offset + d) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (v0 + u * kThreads < vectors) *reinterpret_cast<uint4*>(q_smem + (v0 + u * kThreads) * V) = regs[u];
  }
}

// The tile's queries in shared memory: as they are for the tensor cores, else as float. Zero past D and past `count`.
template <typename T, typename U>
__device__ __forceinline__ void stage_queries(const FactorTile& tile, const LogitsParams& p, U* q_smem) {
  if constexpr (sizeof(U) == 2)
    if (p.whole_vectors_of_q) return stage_queries_by_vectors(tile, p, q_smem);
  const T* q = static_cast<const T*>(p.q.data);
  const int width = p.q_ld, rows = sizeof(U) == 2 ? p.block_rows : tile.count;
  for (int i = threadIdx.x; i < rows * width; i += kThreads) {
    const int row = i / width, d = i - row * width;
    const bool exists = row < tile.count && d < p.shape.D;
    const T x = exists ? q[tile.rows[row].q_offset + d] : from_float<T>(0.f);
    if constexpr (sizeof(U) == 2)
      q_smem[i] = x;
    else
      q_smem[i] = to_float(x);
  }
}

}  // namespace relpos
