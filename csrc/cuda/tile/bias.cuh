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

struct FactorPiece {
  int first, a, low, high;  // query; axis; table row, and the last one that counts
};

// The products of a tile in pieces, strips of queries times spans of table rows. Spans of one axis come after those of
// another, so that all warps have work, however few rows an axis has. False if there is no i-th.
template <int STRIP, int SPAN>
__device__ __forceinline__ bool find_piece(const LogitsFwdParams& p, const int* ranges, int i, FactorPiece& piece) {
  int strip, spans[kAxes];
#pragma unroll
  for (int a = 0; a < kAxes; ++a) spans[a] = ceil_div(ranges[2 * a + 1] - ranges[2 * a] + 1, SPAN);
  const int span = p.by_strips.divide(i, strip), end_t = spans[kT], end_h = end_t + spans[kH];
  const int a = int{span >= end_t} + int{span >= end_h}, begin = a == kT ? 0 : a == kH ? end_t : end_h;
  piece = {strip * STRIP, a, ranges[2 * a] + (span - begin) * SPAN, ranges[2 * a + 1]};
  return span < end_h + spans[kW];
}

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
__device__ __forceinline__ void tile_factors_mma(const FactorTile& tile, const LogitsFwdParams& p, const int* ranges,
                                                 const T* q_smem) {
  constexpr int kBlocks = 4;  // of 8 table rows, sharing operands of q
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  FactorPiece piece;
  for (int i = warp; find_piece<kStripMma, 8 * kBlocks>(p, ranges, i, piece); i += kWarps) {
    const Axis& axis = p.shape.axis[piece.a];
    const int row = piece.first + lane / 4, l0 = piece.low;
    const T* queries = q_smem + piece.first * p.q_ld;
    const int origin[2] = {tile.origin(axis, piece.a, row), tile.origin(axis, piece.a, row + 8)};
    float acc[kBlocks][4] = {};
    int d = 0;
#pragma unroll 1
    for (; d + 16 < p.shape.D; d += 32) add_table_rows<2>(acc, p, queries, l0, piece.high, d);
    if (d < p.shape.D) add_table_rows<1>(acc, p, queries, l0, piece.high, d);
    put_factors<kBlocks * 4>(
        tile, p, piece.a, piece.high, [&](int i) { return acc[i / 4][i % 4]; },
        [&](int i) { return row + i % 4 / 2 * 8; }, [&](int i) { return origin[i % 4 / 2]; },
        [&](int i) { return l0 + i / 4 * 8 + lane % 4 * 2 + i % 2; });
  }
}

// Without tensor cores: a lane takes one table row and 8 queries at a time. q is in shared memory as float.
template <typename T>
__device__ __forceinline__ void tile_factors_simt(const FactorTile& tile, const LogitsFwdParams& p, const int* ranges,
                                                  const float* q_smem) {
  constexpr int kQueries = kStripSimt;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int D = p.shape.D;
  const T* table = static_cast<const T*>(p.table);
  FactorPiece piece;
  for (int i = warp; find_piece<kQueries, 32>(p, ranges, i, piece); i += kWarps) {
    const int first = piece.first, l = piece.low + lane, high = piece.high;
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
        tile, p, piece.a, high, [&](int r) { return acc[r]; }, [&](int r) { return first + r; },
        [&](int r) { return tile.origin(p.shape.axis[piece.a], piece.a, first + r); }, [&](int) { return l; });
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
