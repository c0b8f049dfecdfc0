// table_grad.cuh - gradient of the table from the gradient of the factors, without atomics, in a fixed order.
//
//   dR_a[c, i] = sum over queries m with coordinate c on axis a of d_rel_a[m, i] * q[m]        partial_kernel
//   dtable[l]  = sum over c of dR_a[c, i] where index[c, i] = l                                sum_kernel
//
//   partial_kernel: a product of the factor gradients, transposed, with q, 32 queries at a time
//     grid     (query coordinates of all axes, splits): a block sums a fixed share of the queries of its coordinate.
//     thread   eight threads stage one query, where q lies so by 16 bytes and one step ahead; tensor cores: a warp's
//              share of a tile of 64 keys x 128 elements of D;
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

// The query that a thread helps to stage, of queries u0 .. u0 + 31 of the block: its factors from key i0 on, its q from
// element d0 on. Zero past the end of anything.
template <typename T>
struct Staged {
  bool exists;
  int keys, width;  // that there are
  const float* factors;
  const T* q;

  __device__ __forceinline__ Staged(const TableGradParams& p, const GradBlock& block, int64_t u0, int i0, int d0)
      : exists(u0 + query() < block.end), keys(p.shape.axis[block.a].keys - i0), width(p.shape.D - d0) {
    const auto& of_axis = p.of_axis[block.a];
    const Axis& axis = p.shape.axis[block.a];
    const int inner = static_cast<int>(of_axis.by_inner.divisor);
    int rest, below, head;
    const int group = of_axis.by_per_group.divide(static_cast<int>(u0 + query()), rest);
    const int above = of_axis.by_inner.divide(rest, below);
    const int m = p.shape.prefix + (above * axis.queries + block.c) * inner + below;
    const int batch = p.by_heads.divide(group, head);
    factors = p.dfactors + (group * p.shape.M() + m) * p.shape.factors() + axis.factor + i0;
    q = static_cast<const T*>(p.q.data) + batch * p.q.batch + head * p.q.head + m * p.q.row + d0;
  }
  static __device__ __forceinline__ int query() { return threadIdx.x / kStagers; }
  static __device__ __forceinline__ int stager() { return threadIdx.x % kStagers; }
  __device__ __forceinline__ float factor(int i) const { return exists && i < keys ? factors[i] : 0.f; }
  __device__ __forceinline__ T element(int d) const { return exists && d < width ? q[d] : from_float<T>(0.f); }
  __device__ __forceinline__ uint4 vector(int d) const {
    return exists && d < width ? *reinterpret_cast<const uint4*>(q + d) : make_uint4(0, 0, 0, 0);
  }
  // put_factor(i, x), put_q(d, x), one by one.
  template <typename F, typename G>
  __device__ __forceinline__ void for_each(F&& put_factor, G&& put_q) const {
    for (int i = stager(); i < kProductRows; i += kStagers) put_factor(i, factor(i));
    for (int d = stager(); d < min(kProductColumns, round_up(width, kGradSide)); d += kStagers) put_q(d, element(d));
  }
};

// Shared memory of a tile for tensor cores: factors in two halves, and q.
template <typename T>
struct GradTile {
  static constexpr int kFactorLd = kProductRows + kProductPad, kQLd = kProductColumns + kProductPad;
  T *high, *low, *q;

  __device__ __forceinline__ explicit GradTile(unsigned char* shared)
      : high(reinterpret_cast<T*>(shared)), low(high + kProductDepth * kFactorLd), q(low + kProductDepth * kFactorLd) {}
  __device__ __forceinline__ void put_factor(int i, float x) const {
    const int at = Staged<T>::query() * kFactorLd + i;
    split(x, high[at], low[at]);
  }
  template <typename Piece>
  __device__ __forceinline__ void put_q(int d, Piece x) const {
    *reinterpret_cast<Piece*>(q + Staged<T>::query() * kQLd + d) = x;
  }
};

// What a thread stages where q lies at multiples of 16 bytes: held in registers while others are multiplied.
template <typename T>
struct HeldShare {
  static constexpr int V = kVector<T>, kFactors = kProductRows / kStagers, kVectors = kProductColumns / kStagers / V;
  float factors[kFactors];
  uint4 q[kVectors];

  __device__ __forceinline__ void load(const Staged<T>& from) {
#pragma unroll
    for (int i = 0; i < kFactors; ++i) factors[i] = from.factor(i * kStagers + from.stager());
#pragma unroll
    for (int i = 0; i < kVectors; ++i) q[i] = from.vector((i * kStagers + from.stager()) * V);
  }
  __device__ __forceinline__ void put(const GradTile<T>& to) const {
    const int stager = Staged<T>::stager();
#pragma unroll
    for (int i = 0; i < kFactors; ++i) to.put_factor(i * kStagers + stager, factors[i]);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) to.put_q((i * kStagers + stager) * V, q[i]);
  }
};

template <typename T, bool VECTORS>
__device__ __forceinline__ void grad_tile_mma(const TableGradParams& p, const GradBlock& block, int i0, int d0,
                                              unsigned char* shared, float* out) {
  const GradTile<T> tile(shared);
  const int keys = p.shape.axis[block.a].keys, columns = min(kProductColumns, p.shape.D - d0);
  const WarpShare mine(kProductRows, columns);
  float acc[kProductBlocks][4] = {};
  HeldShare<T> next;
  if constexpr (VECTORS) next.load(Staged<T>(p, block, block.begin, i0, d0));
  for (int64_t u0 = block.begin; u0 < block.end; u0 += kProductDepth) {
    if constexpr (VECTORS) {
      next.put(tile);
      next.load(Staged<T>(p, block, u0 + kProductDepth, i0, d0));
    } else {
      Staged<T>(p, block, u0, i0, d0)
          .for_each([&](int i, float x) { tile.put_factor(i, x); }, [&](int d, T x) { tile.put_q(d, x); });
    }
    __syncthreads();
    accumulate<T, true>(acc, mine, tile.high, tile.low, tile.kFactorLd, tile.q, tile.kQLd);
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
    const Staged<T> staged(p, block, u0, i0, d0);
    staged.for_each([&](int i, float f) { factors_smem[staged.query() * kProductRows + i] = f; },
                    [&](int d, T e) { q_smem[staged.query() * kProductColumns + d] = to_float(e); });
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
      if constexpr (!MMA)
        grad_tile_simt<T>(p, block, i0, d0, shared, out);
      else if (p.whole_vectors_of_q)
        grad_tile_mma<T, true>(p, block, i0, d0, shared, out);
      else
        grad_tile_mma<T, false>(p, block, i0, d0, shared, out);
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
