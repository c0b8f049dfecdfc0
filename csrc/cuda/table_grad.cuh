// table_grad.cuh - gradient of the table from the gradient of the factors, without atomics, in a fixed order.
//
//   dR_a[c, i] = sum over queries m with coordinate c on axis a of d_rel_a[m, i] * q[m]        partial_kernel
//   dtable[l]  = sum over c of dR_a[c, i] where index[c, i] = l                                sum_kernel
//
//   partial_kernel: a product of the factor gradients, transposed, with q; a tile of 64 keys x `columns` elements of D
//     grid     (query coordinates of all axes x tiles, splits): a block sums a fixed share of its coordinate's queries.
//     thread   locates two of up to 512 queries. Then, with tensor cores, 64 queries at a time, one step ahead: of four
//              threads that copy the q of one; loads factors of 4 .. 16 for its warp's 8 keys, straight into operands.
//              Else 32 at a time: of eight that stage one; (x, y) of 16 x 16 takes keys y, y + 16, .. and elements x,
//              x + 16, ..
//     shared   where 512 queries lie. With tensor cores, q of 2 x 64 queries, padded, and in the end, in its place, the
//              sums of all warps, [64, columns]: where keys are few, several warps have the same, of other queries.
//              Else factors [32, 64] and q [32, 128], as float.
//     barriers per 512 queries: they are located; all is done with them and with q. Per step: q is there, that before
//              may be overwritten. At the end: sums are there. Else two per 32 queries: they are there; they may be
//              overwritten.
//   sum_kernel
//     grid     (table rows, ceil(D / kSumColumns)).
//     thread   looks up one of 256 query coordinates; sums four elements of D of a share of the partial sums, those of
//              a coordinate and its key split by split, kSumAtOnce loads in flight; adds the shares of one element.
//     shared   what each warp has found; pairs of up to 256 query coordinates and their keys; sums, [shares, elements].
//     barriers two per 256 query coordinates: counts are there; pairs are there. At the end: sums are there.
#pragma once
#include "tile/long_sum.cuh"
#include "tile/mma.cuh"
#include "tile/rows.cuh"

namespace relpos {

constexpr int kGradSide = 16;  // threads of a row and of a column without tensor cores
constexpr int kGradKeysPerThread = kProductRows / kGradSide, kGradDPerThread = kProductColumns / kGradSide;
constexpr int kLocated = 512, kGradDepth = 64;  // queries at a time
constexpr int kGradChunks = kGradDepth / 16;    // of the depth of one product

// Elements of D of a block: all, up to 96, or 64, so that registers are enough. Without tensor cores up to 128.
constexpr int grad_columns(bool mma, int D) {
  return mma ? (D <= 64 || D > 96 ? 64 : D <= 80 ? 80 : 96) : kProductColumns;
}

struct GradBlock {
  int a, c;        // axis and query coordinate
  int begin, end;  // queries with that coordinate
  int i0, d0;      // first key and element of D
};

__device__ __forceinline__ GradBlock grad_block(const TableGradParams& p) {
  int tile, d_tile, a = 0, c = p.by_tiles.divide(blockIdx.x, tile);
  const int key_tile = p.by_d_tiles.divide(tile, d_tile);
  for (; p.shape.axis[a].rows == 0 || c >= p.shape.axis[a].queries; ++a)
    c -= p.shape.axis[a].rows == 0 ? 0 : p.shape.axis[a].queries;
  const auto& of_axis = p.of_axis[a];
  const int64_t queries = p.shape.groups * of_axis.by_per_group.divisor, begin = blockIdx.y * of_axis.per_split;
  const int64_t end = min(begin + of_axis.per_split, queries);
  return {a, c, static_cast<int>(min(begin, end)), static_cast<int>(end), key_tile * kProductRows, d_tile * p.columns};
}

// Where up to kLocated queries of a block lie, in shared memory: elements of q, bytes of the factors.
struct Located {
  static constexpr int64_t kBytes = 2 * kLocated * sizeof(int64_t);
  int64_t *q, *factors;

  __device__ __forceinline__ explicit Located(unsigned char* shared)
      : q(reinterpret_cast<int64_t*>(shared)), factors(q + kLocated) {}
  // So that the four queries of 16 lie together that a lane multiplies: 2t, 2t + 1, 2t + 8, 2t + 9.
  static __device__ __forceinline__ int place(int i) { return i / 16 * 16 + i % 8 / 2 * 4 + i / 8 % 2 * 2 + i % 2; }

  // From query `first` of the block on; the last one again where a step needs more.
  __device__ __forceinline__ void locate(const TableGradParams& p, const GradBlock& block, int first, int count) const {
    const auto& of_axis = p.of_axis[block.a];
    const Axis& axis = p.shape.axis[block.a];
    const int inner = static_cast<int>(of_axis.by_inner.divisor);
#pragma unroll 1
    for (int i = threadIdx.x; i < round_up(count, kGradDepth); i += kThreads) {
      int rest, below, head;
      const int group = of_axis.by_per_group.divide(first + min(i, count - 1), rest);
      const int above = of_axis.by_inner.divide(rest, below);
      const int m = p.shape.prefix + (above * axis.queries + block.c) * inner + below;
      const int batch = p.by_heads.divide(group, head);
      q[i] = batch * p.q.batch + head * p.q.head + m * p.q.row;
      factors[place(i)] = (group * p.shape.M() + m) * p.shape.factors() * int64_t{sizeof(float)};
    }
  }
};

// How the warps share up to 64 keys, by blocks of 8: where there are few, some have the same, of other queries.
struct KeyShare {
  int blocks, subset, key;  // the last: of this lane
  int first_chunk, chunks;  // of the queries of a step, by 16

  __device__ __forceinline__ KeyShare(int keys, int thread) : blocks(keys > 32 ? 8 : keys > 16 ? 4 : 2) {
    subset = thread / 32 / blocks;
    key = thread / 32 % blocks * 8 + thread % 32 / 4;
    chunks = kGradChunks * blocks / kWarps;
    first_chunk = subset * chunks;
  }
};

// The tile of a block, COLUMNS elements of D and up to 64 keys, for tensor cores.
template <typename T, int COLUMNS>
struct GradTile {
  static constexpr int kTiles = COLUMNS / 16, kAtOnce = kTiles > 5 ? 3 : kTiles;  // products that do not wait
  static constexpr int kAhead = kTiles > 5 ? 2 : kGradChunks;  // chunks of factors on their way, as registers allow
  static constexpr int kLd = COLUMNS + kProductPad, kSumLd = COLUMNS + 4;  // free of bank conflicts
  static constexpr int kStagers = kThreads / kGradDepth, kStep = kStagers * kVector<T>;
  static_assert(kProductRows * kSumLd * int64_t{4} <= 2 * kGradDepth * kLd * int64_t{sizeof(T)}, "they share a place");
  const TableGradParams& p;
  const KeyShare mine;
  const int keys, width;  // that there are
  const Located at;
  unsigned char* const shared;
  const T* q;
  const char* factors;  // of this lane's key; Located has bytes

  __device__ __forceinline__ GradTile(const TableGradParams& p, const GradBlock& block, unsigned char* memory)
      : p(p),
        mine(p.shape.axis[block.a].keys - block.i0, threadIdx.x),
        keys(min(kProductRows, p.shape.axis[block.a].keys - block.i0)),
        width(p.shape.D - block.d0),
        at(memory),
        shared(memory + Located::kBytes),
        q(static_cast<const T*>(p.q.data) + block.d0),
        factors(reinterpret_cast<const char*>(p.dfactors + p.shape.axis[block.a].factor + block.i0 + mine.key)) {}
  // q of queries u0 and on in shared memory: one of two places.
  __device__ __forceinline__ T* q_smem(int u0) const {
    return reinterpret_cast<T*>(shared) + u0 / kGradDepth % 2 * kGradDepth * kLd;
  }

  // q of queries u0 and on, to be waited for; zeros past its width.
  __device__ __forceinline__ void stage(int u0) const {
    if (p.whole_vectors_of_q) {
      const int query = threadIdx.x / kStagers, d0 = threadIdx.x % kStagers * kVector<T>;
      const T* from = q + at.q[u0 + query] + d0;
      T* to = q_smem(u0) + query * kLd + d0;
#pragma unroll
      for (int d = 0; d < COLUMNS; d += kStep)
        if (d0 < COLUMNS - d) cp_async_16(to + d, from + d, d < width - d0);
    } else {
      const int thread = static_cast<int>(afresh(threadIdx.x)), query = thread / kStagers;
#pragma unroll 1
      for (int d = thread % kStagers; d < COLUMNS; d += kStagers)
        q_smem(u0)[query * kLd + d] = d < width ? q[at.q[u0 + query] + d] : from_float<T>(0.f);
    }
    cp_async_commit();
  }
  // Where this lane's first factors lie; the queries that there are, of those from its first on.
  __device__ __forceinline__ const longlong2* places() const {
    return reinterpret_cast<const longlong2*>(at.factors + mine.first_chunk * 16 + threadIdx.x % 4 * 4);
  }
  __device__ __forceinline__ int left(int count) const {
    return mine.key < keys ? count - mine.first_chunk * 16 - static_cast<int>(threadIdx.x) % 4 * 2 : 0;
  }
  // Factors of four of 16 queries; zeros where there is no key or no query.
  __device__ __forceinline__ void load(float (&x)[4], const longlong2* places, int left) const {
    const longlong2 two[2] = {places[0], places[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const char* place = factors + (i % 2 ? two[i / 2].y : two[i / 2].x);
      x[i] = i / 2 * 8 + i % 2 < left ? *reinterpret_cast<const float*>(place) : 0.f;
    }
  }
  // acc += q, transposed, times factors of those 16 queries, in two halves.
  __device__ __forceinline__ void multiply(float (&acc)[kTiles][4], const uint32_t (&high)[2], const uint32_t (&low)[2],
                                           int u0, int n) const {
    const int lane = threadIdx.x % 32, query = mine.first_chunk * 16 + lane / 16 * 8 + lane % 8;
    const T* from = q_smem(u0) + query * kLd + lane / 8 % 2 * 8 + n * 16 * kLd;
#pragma unroll
    for (int t0 = 0; t0 < kTiles; t0 += kAtOnce) {
      uint32_t a[kAtOnce][4];
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) ldmatrix_x4_trans(a[t], from + (t0 + t) * 16);
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) mma_m16n8k16<T>(acc[t0 + t], a[t], high);
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) mma_m16n8k16<T>(acc[t0 + t], a[t], low);
    }
  }
  // Of all queries, warps with the same keys added in order.
  __device__ __forceinline__ void store(const float (&acc)[kTiles][4], float* out) const {
    float* const sums = reinterpret_cast<float*>(shared);
    const int thread = static_cast<int>(afresh(threadIdx.x)), columns = min(COLUMNS, width) / 4;
    const KeyShare mine(keys, thread);
    const int rows = mine.blocks * 8;
    float* const own = sums + (mine.subset * rows + mine.key / 8 * 8 + thread % 4 * 2) * kSumLd + thread % 32 / 4;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) own[e % 2 * kSumLd + t * 16 + e / 2 * 8] = acc[t][e];
    __syncthreads();
    for (int i = thread; i < keys * columns; i += kThreads) {
      const int key = i / columns, d = i % columns * 4;
      float4 sum = *reinterpret_cast<const float4*>(sums + key * kSumLd + d);
      for (int other = rows; other < kProductRows; other += rows) {
        const float4 more = *reinterpret_cast<const float4*>(sums + (other + key) * kSumLd + d);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      *reinterpret_cast<float4*>(out + static_cast<int64_t>(key) * p.shape.D + d) = sum;
    }
  }
};

template <typename T, int COLUMNS>
__device__ __forceinline__ void grad_tile_mma(const TableGradParams& p, const GradBlock& block, unsigned char* shared,
                                              float* out) {
  constexpr int kAhead = GradTile<T, COLUMNS>::kAhead;
  const GradTile<T, COLUMNS> tile(p, block, shared);
  float acc[COLUMNS / 16][4] = {};
  for (int first = block.begin; first < block.end; first += kLocated) {
    const int count = min(kLocated, block.end - first);
    tile.at.locate(p, block, first, count);
    __syncthreads();
    const longlong2* places = tile.places();
    int left = tile.left(count);
    tile.stage(0);
    float next[kAhead][4];
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
      if (n < tile.mine.chunks) tile.load(next[n], places + n * 8, left - n * 16);
    for (int u0 = 0; u0 < count; u0 += kGradDepth) {
      const bool goes_on = u0 + kGradDepth < count;
      cp_async_wait<0>();
      __syncthreads();
      if (goes_on) tile.stage(u0 + kGradDepth);
#pragma unroll
      for (int n = 0; n < kGradChunks; ++n) {
        if (n >= tile.mine.chunks) break;
        float (&factors)[4] = next[n % kAhead];
        uint32_t high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) split<T>(factors[2 * i], factors[2 * i + 1], high[i], low[i]);
        const int ahead = n + kAhead, in_next = kGradDepth / 16 + n % kAhead;  // chunks from that of places on
        if (ahead < kGradChunks && ahead < tile.mine.chunks)
          tile.load(factors, places + ahead * 8, left - ahead * 16);
        else if (goes_on)
          tile.load(factors, places + in_next * 8, left - in_next * 16);
        tile.multiply(acc, high, low, u0, n);
      }
      places += kGradDepth / 2, left -= kGradDepth;
    }
    __syncthreads();
  }
  tile.store(acc, out);
}

template <typename T>
__device__ __forceinline__ void grad_tile_simt(const TableGradParams& p, const GradBlock& block, unsigned char* shared,
                                               float* out) {
  constexpr int kStagers = kThreads / kProductDepth;
  const Located at(shared);
  float* factors_smem = reinterpret_cast<float*>(shared + Located::kBytes);
  float* q_smem = factors_smem + kProductDepth * kProductRows;
  const int x = threadIdx.x % kGradSide, y = threadIdx.x / kGradSide;
  const int query = threadIdx.x / kStagers, stager = threadIdx.x % kStagers;
  const int keys = p.shape.axis[block.a].keys - block.i0, width = p.shape.D - block.d0;
  float total[kGradKeysPerThread][kGradDPerThread] = {};  // by steps: one long chain of additions rounds more
  for (int u0 = block.begin; u0 < block.end; u0 += kProductDepth) {
    const int located = (u0 - block.begin) % kLocated;
    if (located == 0) {
      at.locate(p, block, u0, min(kLocated, block.end - u0));
      __syncthreads();
    }
    const char* of_keys = reinterpret_cast<const char*>(p.dfactors + p.shape.axis[block.a].factor + block.i0);
    const auto* factors = reinterpret_cast<const float*>(of_keys + at.factors[Located::place(located + query)]);
    const T* q = static_cast<const T*>(p.q.data) + at.q[located + query] + block.d0;
    for (int i = stager; i < kProductRows; i += kStagers)
      factors_smem[query * kProductRows + i] = i < keys ? factors[i] : 0.f;
    for (int d = stager; d < min(kProductColumns, round_up(width, kGradSide)); d += kStagers)
      q_smem[query * kProductColumns + d] = d < width ? to_float(q[d]) : 0.f;
    __syncthreads();
    float acc[kGradKeysPerThread][kGradDPerThread] = {};
    for (int r = 0; r < min(kProductDepth, block.end - u0); ++r) {
#pragma unroll
      for (int i = 0; i < kGradKeysPerThread; ++i) {
        const float f = factors_smem[r * kProductRows + i * kGradSide + y];
#pragma unroll
        for (int d = 0; d < kGradDPerThread; ++d)
          if (d * kGradSide < width) acc[i][d] += f * q_smem[r * kProductColumns + d * kGradSide + x];
      }
    }
#pragma unroll
    for (int i = 0; i < kGradKeysPerThread; ++i)
#pragma unroll
      for (int d = 0; d < kGradDPerThread; ++d) total[i][d] += acc[i][d];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kGradKeysPerThread; ++i)
#pragma unroll
    for (int d = 0; d < kGradDPerThread; ++d) {
      const int key = i * kGradSide + y, element = d * kGradSide + x;
      if (key < keys && element < width) out[static_cast<int64_t>(key) * p.shape.D + element] = total[i][d];
    }
}

constexpr int64_t table_partial_shared(bool mma, int columns) {
  return Located::kBytes + (mma ? 2 * kGradDepth * (columns + kProductPad) * int64_t{2}
                                : kProductDepth * (kProductRows + columns) * int64_t{4});
}

template <typename T, bool MMA>
__global__ void __launch_bounds__(kThreads, 3) table_partial_kernel(const TableGradParams p) {
  RELPOS_DYNAMIC_SHARED(shared);
  const GradBlock block = grad_block(p);
  const Axis& axis = p.shape.axis[block.a];
  if (block.i0 >= axis.keys) return;  // another axis has more
  const int64_t pair = axis.index + static_cast<int64_t>(block.c) * axis.keys + block.i0;
  float* out = p.partials + (blockIdx.y * p.pairs + pair) * p.shape.D + block.d0;
  if constexpr (!MMA) {
    grad_tile_simt<T>(p, block, shared, out);
  } else {
    switch (p.columns) {
      case 64:
        return grad_tile_mma<T, 64>(p, block, shared, out);
      case 80:
        return grad_tile_mma<T, 80>(p, block, shared, out);
      default:
        return grad_tile_mma<T, 96>(p, block, shared, out);
    }
  }
}

constexpr int kSumColumns = 128, kSumAtOnce = 8, kMostShares = 16;

struct SumShared {
  static constexpr int kTotals = kThreads * 4;
  int counts[kWarps], pairs[kThreads];
  LongSum totals[kTotals];  // [shares, columns]
};

// Pairs of query coordinates c0 .. c0 + kThreads - 1 with the keys that use a table row, in order; how many.
__device__ __forceinline__ int find_pairs(const Axis& axis, const int32_t* key_of, int c0, SumShared& shared) {
  const int c = c0 + static_cast<int>(threadIdx.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int key = c < axis.queries ? key_of[static_cast<int64_t>(c) * axis.rows] : -1;
  const unsigned found = __ballot_sync(~0u, key >= 0);
  if (lane == 0) shared.counts[warp] = __popc(found);
  __syncthreads();
  int before = __popc(found & ((1u << lane) - 1)), all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? shared.counts[w] : 0;
    all += shared.counts[w];
  }
  if (key >= 0) shared.pairs[before] = static_cast<int>(axis.index) + c * axis.keys + key;
  __syncthreads();
  return all;
}

// Every shares-th of the partial sums of so many pairs, split by split: those of many queries meet here one by one.
__device__ __forceinline__ void sum_share(const TableGradParams& p, const int* pairs, int count, int share, int shares,
                                          int d, LongSum (&totals)[4]) {
  const int items = count * p.splits;
  for (; share < items; share += shares * kSumAtOnce) {
    float part[kSumAtOnce][4] = {};
#pragma unroll
    for (int u = 0; u < kSumAtOnce; ++u) {  // loads that do not wait for each other
      const int item = share + u * shares;
      if (item < items) {
        int split;
        const int pair = pairs[p.by_splits.divide(item, split)];
        load4(p.partials + (split * p.pairs + pair) * p.shape.D + d, p.shape.D - d, p.shape.D % 4 == 0, part[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kSumAtOnce; ++u)
#pragma unroll
      for (int e = 0; e < 4; ++e) totals[e] += part[u][e];
  }
}

__global__ void __launch_bounds__(kThreads, 3) table_sum_kernel(const TableGradParams p) {
  RELPOS_DYNAMIC_SHARED(memory);
  SumShared& shared = *reinterpret_cast<SumShared*>(memory);
  int a = 0;
  while (static_cast<int>(blockIdx.x) >= p.shape.axis[a].first_row + p.shape.axis[a].rows) ++a;
  const Axis& axis = p.shape.axis[a];
  const int32_t* key_of = p.index + axis.inverse + (blockIdx.x - axis.first_row);
  const int d0 = static_cast<int>(blockIdx.y) * kSumColumns, columns = min(p.shape.D - d0, kSumColumns);
  const int lanes = ceil_div(columns, 4), shares = min(kThreads / lanes, kMostShares);
  const int share = threadIdx.x / lanes, d = threadIdx.x % lanes * 4;
  LongSum totals[4];
  for (int c0 = 0; c0 < axis.queries; c0 += kThreads) {
    const int pairs = find_pairs(axis, key_of, c0, shared);
    if (share < shares) sum_share(p, shared.pairs, pairs, share, shares, d0 + d, totals);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) shared.totals[threadIdx.x * 4 + e] = totals[e];
  __syncthreads();
  if (threadIdx.x >= columns) return;
  LongSum total = shared.totals[threadIdx.x];
  for (int other = 1; other < shares; ++other) total += shared.totals[other * lanes * 4 + threadIdx.x];
  p.dtable[static_cast<int64_t>(blockIdx.x) * p.shape.D + d0 + threadIdx.x] = total;
}

}  // namespace relpos
