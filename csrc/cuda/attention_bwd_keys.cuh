// attention_bwd_keys.cuh - the gradients of k and v; keys stay, queries pass. All products are transposed:
//
//   p[n, m]  = exp(score[m, n] - lse[m])       dv[n] = sum over m of p[n, m] * grad[m]
//   ds[n, m] = p[n, m] * (<v[n], grad[m]> - delta[m])     dk[n] = scale * sum over m of ds[n, m] * q[m]
//
//                     queries, a tile per step --->
//                  +---------+---------+---------+
//   16 or 32 keys  |         |         | ..      |     blocks of 8 neighbouring columns, each of one line:
//   per warp       |         |         |         |     column factors [queries, columns] lie across, and are read
//                  +---------+---------+---------+     transposed; a line factor is one number per query and line
//
//   grid     (groups * ceil(slots / block slots)); slots of keys: shared_attention.h.
//   thread   lane 4 g + t of a warp: keys g and g + 8 of each strip, queries 2t and 2t + 1 of each block of 8.
//   shared   where the block works; two stages of q, grad and the factors of a tile of queries; k and v of the block.
//   barriers one when it is known where; one per tile: it has arrived, and the one before is done with; in float32 one
//            more: it has been split.
#pragma once
#include "tile/slots.cuh"

namespace relpos {

// A tile of queries that passes, with everything about them.
template <typename T, int D>
struct QueryTile {
  ProductTile<T, D> q, grad;
  Factor<T>* columns;  // [queries, column_ld]
  int column_ld;
  float *lines, *statistics;  // [lines, queries], [delta and, for float32, what p is to be multiplied by, queries]
};

// The same in one of the two stages that tiles pass through.
template <typename T, int D>
struct QueryStage : QueryTile<T, D> {
  static constexpr int kQueries = query_tile(sizeof(T)), kChunk = kVector<T>;
  static constexpr bool kSplit = sizeof(T) == 4;
  static constexpr QueryStageOffsets kAt{D, sizeof(T)};
  Tile<T, D> arriving_q, arriving_grad;
  using QueryTile<T, D>::q, QueryTile<T, D>::grad, QueryTile<T, D>::columns, QueryTile<T, D>::column_ld;
  using QueryTile<T, D>::lines, QueryTile<T, D>::statistics;

  __device__ __forceinline__ QueryStage(unsigned char* shared, const AttentionBwdKeysShared& at, int stage) {
    unsigned char *all = shared + kKeysBlockBytes, *begin = all + kAt.stages(sizeof(T)) + stage * at.bytes_of_stage;
    unsigned char* arriving = kSplit ? all : begin;
    arriving_q.data = reinterpret_cast<T*>(arriving), arriving_grad.data = reinterpret_cast<T*>(arriving + kAt.grad);
    if constexpr (kSplit) {
      q.data = reinterpret_cast<__nv_bfloat16*>(all + kAt.part_of_q);
      grad.data = reinterpret_cast<__nv_bfloat16*>(all + kAt.part_of_grad);
    } else {
      q = arriving_q, grad = arriving_grad;
    }
    statistics = reinterpret_cast<float*>(begin + kAt.statistics);
    columns = reinterpret_cast<Factor<T>*>(begin + kAt.columns);
    column_ld = at.column_ld;
    lines = reinterpret_cast<float*>(begin + at.lines);
  }

  // Queries m0 and on; zeros where there is none. What lies in shared memory is read before a copy starts: after it,
  // it would be read again.
  __device__ __forceinline__ void copy(const AttentionBwdParams& p, const KeysBlock& block, int m0) const {
    const T *all_q = static_cast<const T*>(block.q), *all_grad = static_cast<const T*>(block.grad);
    const int left = block.M - m0;
    for (int row = threadIdx.x / 2; row < kQueries; row += blockDim.x / 2) {
      const bool exists = row < left;
      const int64_t m = exists ? m0 + row : 0;
      copy_row(arriving_q, row, p.shape.D, all_q + m * p.q.row, exists);
      copy_row(arriving_grad, row, p.shape.D, all_grad + m * p.grad.row, exists);
    }
    copy_columns(p, block.slots, static_cast<const Factor<T>*>(block.columns), m0, left);
    copy_lines(block.lines, block.statistics, block.slots.lines, m0, round_up(block.M, 4));
  }

  // By all threads, of what has arrived.
  __device__ __forceinline__ void split_queries() const {
    split_tile(q, kQueries, arriving_q);
    split_tile(grad, kQueries, arriving_grad);
  }

  __device__ __forceinline__ void copy_columns(const AttentionBwdParams& p, const SlotBlock block,
                                               const Factor<T>* from, int m0, int left) const {
    constexpr int kPerRow = 4;  // threads
    const int first = threadIdx.x / kPerRow, step = blockDim.x / kPerRow, line = block.slots.line;
    const int chunks = p.at_keys.column_blocks * (8 / kChunk);
    for (int chunk = threadIdx.x % kPerRow; chunk < chunks; chunk += kPerRow) {
      const int column = block.column(chunk / (8 / kChunk)) + chunk % (8 / kChunk) * kChunk;
      const Factor<T>* of_row = from + int64_t{m0 + first} * line + column;
      Factor<T>* to = columns + first * column_ld + chunk * kChunk;
      for (int row = first; row < kQueries; row += step, of_row += step * line, to += step * column_ld)
        cp_async_16(to, row < left ? of_row : from, row < left);
    }
  }

  __device__ __forceinline__ void copy_lines(const float* from, const float* from_statistics, int count, int m0,
                                             int queries) const {
    constexpr int kPerLine = kQueries / 4;  // vectors
    for (int i = threadIdx.x; i < (count + statistics_of(sizeof(T))) * kPerLine; i += blockDim.x) {
      const int line = i / kPerLine, m = i % kPerLine * 4, statistic = line - count;
      const bool exists = m0 + m < queries, is_line = statistic < 0;
      const float* all = is_line ? from + int64_t{line} * queries : from_statistics + int64_t{statistic} * queries;
      float* to = is_line ? lines + line * kQueries : statistics + statistic * kQueries;
      cp_async_16(to + m, all + (exists ? m0 + m : 0), exists);
    }
  }
};

// A warp's strips of 16 keys; PART blocks of 8 queries at a time.
template <typename T, int D, int STRIPS, int PART>
struct AttentionBwdKeys {
  using Rows = ProductTile<T, D>;
  const AttentionBwdParams& p;
  int first;  // of the warp's keys in the block
  float dk[STRIPS][D / 8][4] = {}, dv[STRIPS][D / 8][4] = {};

  __device__ __forceinline__ AttentionBwdKeys(const AttentionBwdParams& p, int first) : p(p), first(first) {}

  // What the products of k and q start from: column factors of queries `begin` ..
  template <typename Blocks>
  __device__ __forceinline__ void start(float (&score)[STRIPS][PART][4], const Blocks& blocks,
                                        const QueryTile<T, D>& tile, int begin) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (sizeof(T) == 2) {
          uint32_t pairs[PART];
          load_blocks_transposed(pairs,
                                 tile.columns + (begin + lane % (8 * PART)) * tile.column_ld + blocks.column(s, half));
#pragma unroll
          for (int j = 0; j < PART; ++j) {
            const uint32_t pair = blocks.has_bias(s, half) ? pairs[j] : 0u;
            const float2 two = unpack_pair<__half>(pair);
            score[s][j][2 * half] = two.x, score[s][j][2 * half + 1] = two.y;
          }
        } else {
#pragma unroll
          for (int j = 0; j < PART; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int m = begin + j * 8 + lane % 4 * 2 + e;
              const float x = tile.columns[m * tile.column_ld + blocks.column(s, half) + lane / 4];
              score[s][j][2 * half + e] = blocks.has_bias(s, half) ? x : 0.f;
            }
        }
      }
  }

  // Queries `begin` .. of a tile; also(ds), as their products lie in registers.
  template <typename Blocks, typename F>
  __device__ __forceinline__ void absorb(const Blocks& blocks, const QueryTile<T, D>& tile, int begin, const Rows& k,
                                         const Rows& v, int statistics_ld, F&& also) {
    float score[STRIPS][PART][4], dp[STRIPS][PART][4] = {};
    start(score, blocks, tile, begin);
    // Swapped: the scores of attention_bwd_queries.cuh to the last bit.
    add_products<true>(score, StripRows<Rows, 0>(k, first), tile.q, begin, p.shape.D);
    add_products(dp, StripRows<Rows, 0>(v, first), tile.grad, begin, p.shape.D);
#pragma unroll
    for (int j = 0; j < PART; ++j) {
      const int m = begin + j * 8 + threadIdx.x % 4 * 2;
      const float2 delta = *reinterpret_cast<const float2*>(tile.statistics + m);
      float2 factor = {1.f, 1.f};
      if constexpr (sizeof(T) == 4) factor = *reinterpret_cast<const float2*>(tile.statistics + statistics_ld + m);
#pragma unroll
      for (int s = 0; s < STRIPS; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 add = *reinterpret_cast<const float2*>(tile.lines + blocks.line(s, half) + m);
          float* x = score[s][j] + 2 * half;
          float* d = dp[s][j] + 2 * half;
          x[0] = exp2_approx(fmaf(x[0], p.to_powers, add.x)) * factor.x;
          x[1] = exp2_approx(fmaf(x[1], p.to_powers, add.y)) * factor.y;
          d[0] = x[0] * (d[0] - delta.x), d[1] = x[1] * (d[1] - delta.y);
        }
    }
    add_weighted(dv, score, tile.grad, begin, p.shape.D);
    also(dp);
    add_weighted(dk, dp, tile.q, begin, p.shape.D);
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kMostAttentionThreads, 1) attention_bwd_keys_kernel(const AttentionBwdParams p) {
  constexpr int kStrips = strips_of(sizeof(T), D), kPart = sizeof(T) == 4 || kStrips == 2 ? 2 : 4;
  constexpr int kQueries = query_tile(sizeof(T));
  RELPOS_DYNAMIC_SHARED(shared);
  const AttentionBwdKeysShared& at = p.at_keys;
  using Rows = ProductTile<T, D>;
  const Rows k{reinterpret_cast<decltype(Rows::data)>(shared + at.k)};
  const Rows v{reinterpret_cast<decltype(Rows::data)>(shared + at.v)};

  KeysBlock& block = *reinterpret_cast<KeysBlock*>(shared);
  if (threadIdx.x == 0) block.fill<T>(p);
  __syncthreads();
  copy_slots(k, p, p.k, block);
  copy_slots(v, p, p.v, block);

  AttentionBwdKeys<T, D, kStrips, kPart> mine(p, threadIdx.x / 32 * 16 * kStrips);
  const KeyBlocks<kStrips> blocks(p, block.slots, mine.first, kQueries);
  const int M = block.M;
  for (int m = -kQueries; m < M; m += kQueries) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before is done with
    const int which = m / kQueries & 1;
    if constexpr (sizeof(T) == 4) {
      if (m >= 0) QueryStage<T, D>(shared, at, which).split_queries();
      __syncthreads();  // its parts are there, and it may be overwritten
    }
    if (m + kQueries < M) QueryStage<T, D>(shared, at, 1 - which).copy(p, block, m + kQueries);
    cp_async_commit();
    if (m < 0) continue;
    const QueryStage<T, D> stage(shared, at, which);
#pragma unroll 1
    for (int begin = 0; begin < min(kQueries, M - m); begin += kPart * 8)
      mine.absorb(blocks, stage, begin, k, v, kQueries, [](const auto&) {});
  }
  const auto token = [&](int row) { return block.slots.token(p.shape, block.slots.first + row); };
  store_slots(p, p.dk, mine.dk, p.scale, k, mine.first, block.place, token);
  store_slots(p, p.dv, mine.dv, 1.f, v, mine.first, block.place, token);
}

}  // namespace relpos
