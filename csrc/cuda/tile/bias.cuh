// bias.cuh - the factors of a tile: factors[m, axis.factor + i] = <q[m], table[index[c(m), i]]>.
//
// Queries of a tile use a short range of table rows on each axis, though each query another window of it. So the
// product of the tile with the whole range is formed, and every element goes to the key that `inverse` names:
//
//                table rows l, low .. high
//               +--------------------------+
//   queries m   | . . k2 k1 k0 .  .  .  .  |      k0, k1, ...: the keys of this query
//               | . . .  k2 k1 k0 .  .  .  |      . : computed, not used
//               +--------------------------+
#pragma once
#include "copy.cuh"
#include "rows.cuh"

namespace relpos {

struct FactorTile {
  const RowOfTile* rows;
  int count;  // rows of the tile that exist
  float* factors;
  int ld;
};

// Elements of the product to where they belong: value(i) is that of query row(i) and table row l(i). All keys are asked
// for before the first is waited for.
template <int COUNT, typename Value, typename Row, typename L>
__device__ __forceinline__ void put_factors(const FactorTile& tile, const LogitsParams& p, int a, int high,
                                            Value&& value, Row&& row, L&& l) {
  const Axis& axis = p.shape.axis[a];
  const int32_t* key_of = p.index + axis.inverse - axis.first_row;
  int key[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int c = row(i) < tile.count ? tile.rows[row(i)].coordinate[a] : -1;
    key[i] = (c >= 0) & (l(i) <= high) ? key_of[c * axis.rows + l(i)] : -1;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (key[i] >= 0) tile.factors[row(i) * tile.ld + axis.factor + key[i]] = value(i);
}

// Tensor cores: a warp takes 16 queries and 32 table rows at a time. q is in shared memory, zero past D.
template <typename T>
__device__ __forceinline__ void axis_factors_mma(const FactorTile& tile, const LogitsParams& p, int a, int low,
                                                 int high, const T* q_smem) {
  constexpr int kBlocks = 4;  // of 8 table rows, sharing the fragments of q
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int strips = ceil_div(tile.count, 16), spans = ceil_div(high - low + 1, 8 * kBlocks);
  const int D = p.shape.D;
  const T* table = static_cast<const T*>(p.table);
  for (int item = warp; item < strips * spans; item += kWarps) {
    const int strip = item % strips, l0 = low + item / strips * 8 * kBlocks;
    float acc[kBlocks][4] = {};
    for (int k0 = 0; k0 < D; k0 += 16) {
      uint32_t q_regs[4];
      ldmatrix_x4(q_regs, q_smem + (strip * 16 + lane % 16) * p.q_ld + k0 + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const int l = l0 + n * 8 + lane / 4, d = k0 + lane % 4 * 2;
        const T* pair = table + static_cast<int64_t>(l) * D + d;
        const uint32_t table_regs[2] = {l <= high ? *reinterpret_cast<const uint32_t*>(pair) : 0u,
                                        l <= high && d + 8 < D ? *reinterpret_cast<const uint32_t*>(pair + 8) : 0u};
        mma_m16n8k16<T>(acc[n], q_regs, table_regs);
      }
    }
    put_factors<kBlocks * 4>(
        tile, p, a, high, [&](int i) { return acc[i / 4][i % 4]; },
        [&](int i) { return strip * 16 + lane / 4 + i % 4 / 2 * 8; },
        [&](int i) { return l0 + i / 4 * 8 + lane % 4 * 2 + i % 2; });
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
        tile, p, a, high, [&](int r) { return acc[r]; }, [&](int r) { return first + r; }, [&](int) { return l; });
  }
}

// As the next function, for tensor cores, where rows of q begin at multiples of 16 bytes.
template <typename T>
__device__ __forceinline__ void stage_queries_by_vectors(const FactorTile& tile, const LogitsParams& p, T* q_smem) {
  constexpr int V = kVector<T>, kUnroll = 3;
  const T* q = static_cast<const T*>(p.q.data);
  const int in_row = p.q_ld / V, vectors = p.block_rows * in_row;
  for (int v0 = threadIdx.x; v0 < vectors; v0 += kUnroll * kThreads) {
    uint4 regs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = v0 + u * kThreads, row = v / in_row, d = (v - row * in_row) * V;
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
