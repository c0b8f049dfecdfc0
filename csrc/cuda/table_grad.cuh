// table_grad.cuh - gradient of the table from the gradient of the factors, without atomics, in a fixed order.
//
//   dR_a[c, i] = sum over queries m with coordinate c on axis a of d_rel_a[m, i] * q[m]        partial_kernel
//   dtable[l]  = sum over c of dR_a[c, i] where index[c, i] = l                                sum_kernel
//
//   partial_kernel: a product of the factor gradients, transposed, with q, 32 queries at a time
//     grid     (query coordinates of all axes, splits): a block sums a fixed share of the queries of its coordinate.
//     thread   eight threads stage one query, q by 16 bytes where it lies so; tensor cores: a warp's share of a tile
//              of 64 keys x 128 elements of D;
//              else (x, y) of 16 x 16 takes keys y, y + 16, .. and elements x, x + 16, ..
//     shared   factors [32, 64] and q [32, 128], as float or, padded, as high, low and q in the type of q.
//     barriers two per 32 queries: they are there; they may be overwritten.
//   sum_kernel
//     grid     (table rows, ceil(D / kSumThreads)).
//     thread   an element of D, and a share of all pairs of c and split, one after another, kSumAtOnce loads in flight.
//     shared   sums of the shares, [shares, elements], added in order.
//     barriers sums are there.
#pragma once
#include "tile/long_sum.cuh"
#include "tile/mma.cuh"
#include "tile/rows.cuh"

namespace relpos {

constexpr int kGradSide = 16;  // threads of a row and of a column without tensor cores
constexpr int kGradKeysPerThread = kProductRows / kGradSide, kGradDPerThread = kProductColumns / kGradSide;
constexpr int kStagers = kThreads / kProductDepth;

struct GradBlock {
  int a, c;            // axis and query coordinate
  int64_t begin, end;  // queries with that coordinate
};

__device__ __forceinline__ GradBlock grad_block(const TableGradParams& p) {
  int a = 0, c = blockIdx.x;
  for (; p.shape.axis[a].rows == 0 || c >= p.shape.axis[a].queries; ++a)
    c -= p.shape.axis[a].rows == 0 ? 0 : p.shape.axis[a].queries;
  const int64_t queries = p.shape.groups * (p.shape.grid_queries() / p.shape.axis[a].queries);
  return {a, c, queries * blockIdx.y / p.splits, queries * (blockIdx.y + 1) / p.splits};
}

// Where the u-th query of the block is: its row of the logits (and of the factors), its row of q.
__device__ __forceinline__ void find_query(const TableGradParams& p, const GradBlock& block, int64_t u, int64_t& row,
                                           int64_t& q_offset) {
  const auto& of_axis = p.of_axis[block.a];
  const int inner = static_cast<int>(of_axis.by_inner.divisor);
  int rest, below, head;
  const int group = of_axis.by_per_group.divide(static_cast<int>(u), rest);
  const int above = of_axis.by_inner.divide(rest, below);
  const int m = p.shape.prefix + (above * p.shape.axis[block.a].queries + block.c) * inner + below;
  const int batch = p.by_heads.divide(group, head);
  row = group * p.shape.M() + m;
  q_offset = batch * p.q.batch + head * p.q.head + m * p.q.row;
}

// Stages queries u0 .. u0 + 31: put_factor(query, key, x), put_q(query, d, x), zero past the end of anything. x of q is
// an element or, with VECTORS and where q lies so, 16 bytes of them.
template <typename T, bool VECTORS, typename F, typename G>
__device__ __forceinline__ void stage_share(const TableGradParams& p, const GradBlock& block, int64_t u0, int i0,
                                            int d0, F&& put_factor, G&& put_q) {
  const Axis& axis = p.shape.axis[block.a];
  const int query = threadIdx.x / kStagers, first = threadIdx.x % kStagers;
  const bool exists = u0 + query < block.end;
  int64_t row = 0, q_offset = 0;
  if (exists) find_query(p, block, u0 + query, row, q_offset);
  const float* factors = p.dfactors + row * p.shape.factors() + axis.factor + i0;
  const T* q = static_cast<const T*>(p.q.data) + q_offset + d0;
  for (int i = first; i < kProductRows; i += kStagers)
    put_factor(query, i, exists && i0 + i < axis.keys ? factors[i] : 0.f);
  const int width = min(kProductColumns, round_up(p.shape.D - d0, kGradSide));
  if constexpr (VECTORS)
    if (p.whole_vectors_of_q) {
      for (int d = first * kVector<T>; d < width; d += kStagers * kVector<T>)
        put_q(query, d, exists && d0 + d < p.shape.D ? *reinterpret_cast<const uint4*>(q + d) : make_uint4(0, 0, 0, 0));
      return;
    }
  for (int d = first; d < width; d += kStagers)
    put_q(query, d, exists && d0 + d < p.shape.D ? q[d] : from_float<T>(0.f));
}

template <typename T>
__device__ __forceinline__ void grad_tile_mma(const TableGradParams& p, const GradBlock& block, int i0, int d0,
                                              unsigned char* shared, float* out) {
  constexpr int kFactorLd = kProductRows + kProductPad, kQLd = kProductColumns + kProductPad;
  T* high = reinterpret_cast<T*>(shared);
  T* low = high + kProductDepth * kFactorLd;
  T* q_smem = low + kProductDepth * kFactorLd;
  const int keys = p.shape.axis[block.a].keys, columns = min(kProductColumns, p.shape.D - d0);
  const WarpShare mine(kProductRows, columns);
  float acc[kProductBlocks][4] = {};
  for (int64_t u0 = block.begin; u0 < block.end; u0 += kProductDepth) {
    stage_share<T, true>(
        p, block, u0, i0, d0,
        [&](int query, int i, float x) { split(x, high[query * kFactorLd + i], low[query * kFactorLd + i]); },
        [&](int query, int d, auto x) { *reinterpret_cast<decltype(x)*>(q_smem + query * kQLd + d) = x; });
    __syncthreads();
    accumulate<T, true>(acc, mine, high, low, kFactorLd, q_smem, kQLd);
    __syncthreads();
  }
  for_each_element(acc, mine, [&](int i, int d, float x) {
    if (i0 + i < keys) out[static_cast<int64_t>(i0 + i) * p.shape.D + d0 + d] = x;
  });
}

template <typename T>
__device__ __forceinline__ void grad_tile_simt(const TableGradParams& p, const GradBlock& block, int i0, int d0,
                                               unsigned char* shared, float* out) {
  float* factors_smem = reinterpret_cast<float*>(shared);
  float* q_smem = factors_smem + kProductDepth * kProductRows;
  const int keys = p.shape.axis[block.a].keys, x = threadIdx.x % kGradSide, y = threadIdx.x / kGradSide;
  float acc[kGradKeysPerThread][kGradDPerThread] = {};
  for (int64_t u0 = block.begin; u0 < block.end; u0 += kProductDepth) {
    stage_share<T, false>(
        p, block, u0, i0, d0, [&](int query, int i, float f) { factors_smem[query * kProductRows + i] = f; },
        [&](int query, int d, T e) { q_smem[query * kProductColumns + d] = to_float(e); });
    __syncthreads();
    for (int r = 0; r < kProductDepth; ++r) {
#pragma unroll
      for (int i = 0; i < kGradKeysPerThread; ++i) {
        const float f = factors_smem[r * kProductRows + i * kGradSide + y];
#pragma unroll
        for (int d = 0; d < kGradDPerThread; ++d)
          if (d0 + d * kGradSide < p.shape.D) acc[i][d] += f * q_smem[r * kProductColumns + d * kGradSide + x];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kGradKeysPerThread; ++i)
#pragma unroll
    for (int d = 0; d < kGradDPerThread; ++d) {
      const int key = i0 + i * kGradSide + y, element = d0 + d * kGradSide + x;
      if (key < keys && element < p.shape.D) out[static_cast<int64_t>(key) * p.shape.D + element] = acc[i][d];
    }
}

constexpr int64_t table_partial_shared(bool mma) {
  return mma ? kProductDepth * (2 * (kProductRows + kProductPad) + kProductColumns + kProductPad) * int64_t{2}
             : kProductDepth * (kProductRows + kProductColumns) * int64_t{4};
}

template <typename T, bool MMA>
__global__ void __launch_bounds__(kThreads, 3) table_partial_kernel(const TableGradParams p) {
  RELPOS_DYNAMIC_SHARED(shared);
  const GradBlock block = grad_block(p);
  const Axis& axis = p.shape.axis[block.a];
  float* out = p.partials + (blockIdx.y * p.pairs + axis.index + static_cast<int64_t>(block.c) * axis.keys) * p.shape.D;
  for (int i0 = 0; i0 < axis.keys; i0 += kProductRows)
    for (int d0 = 0; d0 < p.shape.D; d0 += kProductColumns) {
      if constexpr (MMA)
        grad_tile_mma<T>(p, block, i0, d0, shared, out);
      else
        grad_tile_simt<T>(p, block, i0, d0, shared, out);
    }
}

constexpr int kSumThreads = 512, kSumAtOnce = 8;

// Partial sums first .. last of a table row, counted query coordinate by query coordinate, split by split: those of
// many queries meet here one by one.
__device__ __forceinline__ void sum_share(const TableGradParams& p, const Axis& axis, const int32_t* key_of, int d,
                                          int64_t first, int64_t last, LongSum<float>& total) {
  int c = static_cast<int>(first / p.splits), split = static_cast<int>(first % p.splits);
  for (; first < last; first += kSumAtOnce) {
    int64_t at[kSumAtOnce];  // first all keys, then all sums: loads that do not wait for each other
#pragma unroll
    for (int u = 0; u < kSumAtOnce; ++u) {
      const int key = first + u < last ? key_of[static_cast<int64_t>(c) * axis.rows] : -1;
      const int64_t pair = axis.index + static_cast<int64_t>(c) * axis.keys + key;
      at[u] = key >= 0 ? (split * p.pairs + pair) * p.shape.D + d : -1;
      if (++split == p.splits) split = 0, ++c;
    }
    float part[kSumAtOnce];
#pragma unroll
    for (int u = 0; u < kSumAtOnce; ++u) part[u] = at[u] >= 0 ? p.partials[at[u]] : 0.f;
#pragma unroll
    for (int u = 0; u < kSumAtOnce; ++u) total.add(part[u]);
  }
}

__global__ void __launch_bounds__(kSumThreads, 2) table_sum_kernel(const TableGradParams p) {
  RELPOS_DYNAMIC_SHARED(shared);
  LongSum<float>* totals = reinterpret_cast<LongSum<float>*>(shared);
  const Shape& s = p.shape;
  int a = 0;
  while (static_cast<int>(blockIdx.x) >= s.axis[a].first_row + s.axis[a].rows) ++a;
  const Axis& axis = s.axis[a];
  const int32_t* key_of = p.index + axis.inverse + (blockIdx.x - axis.first_row);
  const int width = min(round_up(s.D, 32), kSumThreads), shares = kSumThreads / width;
  const int x = threadIdx.x % width, share = threadIdx.x / width, d = static_cast<int>(blockIdx.y) * kSumThreads + x;
  const int64_t all = static_cast<int64_t>(axis.queries) * p.splits;
  LongSum<float> total;
  if (share < shares && d < s.D) sum_share(p, axis, key_of, d, all * share / shares, all * (share + 1) / shares, total);
  totals[threadIdx.x] = total;
  __syncthreads();
  if (share != 0 || d >= s.D) return;
  for (int other = 1; other < shares; ++other) total.add(totals[other * width + x]);
  p.dtable[static_cast<int64_t>(blockIdx.x) * s.D + d] = total.sum;
}

constexpr int64_t kTableSumShared = kSumThreads * int64_t{sizeof(LongSum<float>)};

}  // namespace relpos
