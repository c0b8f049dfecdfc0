// logits_bwd.cuh - gradients of q and of the factors; the gradient of the logits passes through, it is only read.
//
//   d_rel_h[m, i] = sum over keys n in image row i of grad[m, n]        d_rel_w[m, j] = ... in column j
//   dq[m]         = sum over axes a, keys i of d_rel_a[m, i] * R_a[c(m), i]
//
//   grid     (ceil(rows / block_rows)).
//   thread   a lane of the warp that sums every 8th row of the tile, streamed or, where the grid does not allow it,
//            through a buffer; then its share of dq, a product of the factor gradients, spread over the table rows they
//            belong to, with the table.
//   shared   rows [block_rows], ranges [6], factors [block_rows, factor_ld] float, then a buffer per warp for the sums,
//            later the operands of the product.
//   barriers rows are located, sums are complete; ranges are there; two per 32 table rows. Every sum has a fixed order.
#pragma once
#include "tile/mma.cuh"
#include "tile/row_sums.cuh"

namespace relpos {

constexpr int kChain = 64;  // keys that are summed one by one: thousands would add up thousands of roundings

// dq without tensor cores: a thread takes four elements of a row, key by key.
template <typename T>
__device__ __forceinline__ void query_gradient_simt(const LogitsBwdParams& p, const RowOfTile* rows,
                                                    const float* factors, int64_t first_row, int count) {
  const int D = p.shape.D, quads = ceil_div(D, 4);
  const T* table = static_cast<const T*>(p.table);
  for (int item = threadIdx.x; item < count * quads; item += kThreads) {
    int d;
    const int row = p.by_quads.divide(item, d);
    d *= 4;
    float sum[4] = {};
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = p.shape.axis[a];
      const int c = rows[row].coordinate[a];
      if (axis.rows == 0 || c < 0) continue;
      const int32_t* of_query = p.index + axis.index + c * axis.keys;
      const float* weights = factors + row * p.factor_ld + axis.factor;
      for (int i0 = 0; i0 < axis.keys; i0 += kChain) {
        const int end = min(i0 + kChain, axis.keys);
        float part[4] = {};
#pragma unroll 4
        for (int i = i0; i < end; ++i) {
          float t[4];
          load4(table + static_cast<int64_t>(of_query[i]) * D + d, D - d, D % 4 == 0, t);
#pragma unroll
          for (int e = 0; e < 4; ++e) part[e] += weights[i] * t[e];
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += part[e];
      }
    }
    T* dq = static_cast<T*>(p.dq) + (first_row + row) * D + d;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (d + e < D) dq[e] = from_float<T>(sum[e]);
  }
}

struct ProductTiles {
  void *high, *low, *table;
};

// Factor gradients of table rows l0 .. l0 + 31 of one axis, zero where a query does not use the row; and those rows. A
// lane takes a table row, a warp every 8th query; rows are copied meanwhile.
template <typename T>
__device__ __forceinline__ void stage_product(const LogitsBwdParams& p, int a, int l0, int high_row,
                                              const RowOfTile* rows, const float* factors, int count,
                                              const ProductTiles& to) {
  constexpr int kLd = kProductDepth + kProductPad, kUnroll = 4;
  const Axis& axis = p.shape.axis[a];
  const int warp = threadIdx.x / 32, k = threadIdx.x % 32;
  const T* table = table_row<T>(p.table, p.shape, l0);  // the 32 rows are neighbours in memory
#pragma unroll 1
  for (int v = threadIdx.x; v < kProductDepth * p.shape.D / kVector<T>; v += kThreads) {
    int in_row;
    const int row = p.by_vectors.divide(v, in_row);
    cp_async_16(static_cast<T*>(to.table) + row * p.q_ld + in_row * kVector<T>, table + v * kVector<T>,
                l0 + row <= high_row);
  }
  cp_async_commit();
  for (int row0 = warp; row0 < p.block_rows; row0 += kUnroll * kWarps) {
    int key[kUnroll];
    float x[kUnroll];
    const auto origin = [&](int u) {
      const int row = row0 + u * kWarps;
      return origin_of(axis, row < count ? rows[row].coordinate[a] : -1);
    };
    find_keys(axis, p.index, high_row, key, origin, [&](int) { return l0 + k; });
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const float* of_row = factors + (row0 + u * kWarps) * p.factor_ld + axis.factor;
      x[u] = is_between(key[u], 0, axis.keys) ? of_row[key[u]] : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = (row0 + u * kWarps) * kLd + k;
      if (row0 + u * kWarps < p.block_rows) split(x[u], static_cast<T*>(to.high)[at], static_cast<T*>(to.low)[at]);
    }
  }
  cp_async_wait<0>();
}

// dq on tensor cores: D % 8 == 0, D <= 128.
template <typename T>
__device__ __forceinline__ void query_gradient_mma(const LogitsBwdParams& p, const RowOfTile* rows, const int* ranges,
                                                   const float* factors, int count, const ProductTiles& tiles) {
  const int D = p.shape.D;
  const WarpShare mine(p.block_rows, D);
  float acc[kProductBlocks][4] = {};
  for (int a = 0; a < kAxes; ++a) {
    if (p.shape.axis[a].rows == 0) continue;
    for (int l0 = ranges[2 * a]; l0 <= ranges[2 * a + 1]; l0 += kProductDepth) {
      __syncthreads();  // the tiles may be overwritten
      stage_product<T>(p, a, l0, ranges[2 * a + 1], rows, factors, count, tiles);
      __syncthreads();
      accumulate<T>(acc, mine, static_cast<const T*>(tiles.high), static_cast<const T*>(tiles.low),
                    kProductDepth + kProductPad, static_cast<const T*>(tiles.table), p.q_ld);
    }
  }
  const int64_t block_rows = afresh(p.block_rows);  // so that nothing of this is kept in registers until here
  T* dq = static_cast<T*>(p.dq) + blockIdx.x * block_rows * D;
  for_each_element(acc, WarpShare(static_cast<int>(block_rows), D), [&](int row, int d, float x) {
    if (row < count) dq[row * D + d] = from_float<T>(x);
  });
}

// S: gradient of the logits; T: q, dq and table; MMA: dq on tensor cores.
template <typename S, typename T, bool MMA>
__global__ void __launch_bounds__(kThreads, MMA ? 4 : 3) logits_bwd_kernel(const LogitsBwdParams p) {
  RELPOS_DYNAMIC_SHARED(shared);
  const BackwardShared at = backward_shared(p.shape, p.block_rows, p.factor_ld, p.q_ld, MMA);
  RowOfTile* rows = reinterpret_cast<RowOfTile*>(shared + at.rows);
  int* ranges = reinterpret_cast<int*>(shared + at.ranges);
  float* factors = reinterpret_cast<float*>(shared + at.factors);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = p.shape.factors();
  float* buffer = reinterpret_cast<float*>(shared + at.sums + warp * at.sums_per_warp);

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * p.block_rows;
  const int64_t left = p.shape.rows() - first_row;
  const int count = left < p.block_rows ? static_cast<int>(left) : p.block_rows;
  locate_rows(p, first_row, count, rows);
  sum_rows<S>(p, first_row, count, factors, buffer);  // at once: what is located is not needed yet
  __syncthreads();

  find_ranges(p.shape, p.index, rows, count, ranges);
  if (p.dfactors)
    for (int row = warp; row < count; row += kWarps)
      for (int i = lane; i < width; i += 32) p.dfactors[(first_row + row) * width + i] = factors[row * p.factor_ld + i];
  if (p.dq == nullptr) return;
  __syncthreads();
  if constexpr (MMA)
    query_gradient_mma<T>(p, rows, ranges, factors, count, {shared + at.high, shared + at.low, shared + at.table});
  else
    query_gradient_simt<T>(p, rows, factors, first_row, count);
}

}  // namespace relpos
