// attention_bwd_keys_sm90.cuh - attention_bwd_keys.cuh with what sm_90 has; half precision, lines of up to 128 slots.
//
//   the picture, grid, bias: as there, a strip of 16 slots of keys per warp, two warpgroups of 64.
//   products S, then <grad, v> while powers of two are taken of S, then dv while ds is found, then dk.
//   stage    64 queries: q and grad, swizzled; matrices of 64 columns of their column factors, swizzled; delta, and
//            line factors, a row of 64 numbers each. All by TMA, zeros where there is no query.
//   barriers full, empty: as in attention_fwd_sm90.cuh. Factors are read by another proxy than that of TMA: a fence.
#pragma once
#include "tile/slots.cuh"
#include "tile/sm90.cuh"

namespace relpos {

struct AttentionBwdKeysSm90Params : AttentionBwdParams {
  TensorMap q_map, grad_map;            // [D, queries, heads, batch]
  TensorMap columns_map;                // [slots of a line, queries, groups]
  TensorMap lines_map, statistics_map;  // [queries, lines and statistics, groups]
};

template <typename T, int D>
struct AttentionBwdKeysSm90 {
  static constexpr int kQueries = query_tile(2), kPart = D > 96 ? 4 : 8;  // blocks of queries at a time: registers
  static constexpr int kParts = kQueries / 8 / kPart;
  // As there are registers: <grad, v> begins while S is under way, line factors are loaded then.
  static constexpr bool kBothAtOnce = D <= 112, kEarly = D <= 80;
  using Rows = SwizzledRows<T, D, kQueries>;
  using Columns = SwizzledRows<__half, kMostSlotsOfLine, kQueries>;
  const AttentionBwdKeysSm90Params& p;
  const KeysBlock& block;
  unsigned char* stages;
  uint64_t *full, *empty;

  __device__ __forceinline__ unsigned char* of_stage(int stage, int offset) const {
    return stages + stage * p.at_keys_sm90.bytes_of_stage + offset;
  }
  __device__ __forceinline__ int tiles() const { return ceil_div(block.M, kQueries); }

  // By one thread.
  __device__ __forceinline__ void produce() const {
    const AttentionBwdKeysSm90Shared& at = p.at_keys_sm90;
    StageRing ring{at.stage_count};
    for (int tile = 0; tile < tiles(); ++tile, ring.advance()) {
      uint64_t* const here = full + ring.stage;
      mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
      mbarrier_expect_bytes(here, at.filled);
      int of_token[4] = {0, tile * kQueries, block.place.head, block.place.batch};
      Rows{of_stage(ring.stage, 0)}.load(p.q_map, here, of_token);
      Rows{of_stage(ring.stage, at.grad)}.load(p.grad_map, here, of_token);
      for (int i = 0; i < at.column_matrices; ++i) {
        const int of_column[3] = {i * kSm90Row, tile * kQueries, block.place.group};
        tma_load<3>(of_stage(ring.stage, at.columns) + i * Columns::kSpan, p.columns_map, here, of_column);
      }
      const int of_delta[3] = {tile * kQueries, block.slots.slots.lines(p.shape), block.place.group};
      const int of_line[3] = {tile * kQueries, block.slots.first_line, block.place.group};
      tma_load<3>(of_stage(ring.stage, at.statistics), p.statistics_map, here, of_delta);
      tma_load<3>(of_stage(ring.stage, at.lines), p.lines_map, here, of_line);
    }
  }

  // What the products of k and q start from: column factors of queries `begin` .., zero for class tokens.
  __device__ __forceinline__ void start(float (&score)[kPart][4], const KeyBlocks<1>& blocks, const Columns& columns,
                                        int begin) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kPart; j += 4) {
        uint32_t pairs[4];
        load_blocks_transposed(pairs, columns.chunk(begin + j * 8 + threadIdx.x % 32, blocks.column(0, half) / 8));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = blocks.has_bias(0, half) ? pairs[i] : 0u;
          const float2 two = unpack_pair<__half>(pair);
          score[j + i][2 * half] = two.x, score[j + i][2 * half + 1] = two.y;
        }
      }
  }

  // Numbers of the queries that this lane has of each block.
  __device__ __forceinline__ void load_pairs(const float* from, float2 (&pairs)[kPart]) const {
#pragma unroll
    for (int j = 0; j < kPart; ++j) pairs[j] = *reinterpret_cast<const float2*>(from + j * 8 + threadIdx.x % 4 * 2);
  }

  // Queries `begin` .. of a stage, whose column factors `weight` has: starts what they add to dv and dk, of which
  // `weights` and `of_ds` must stay.
  __device__ __forceinline__ void absorb(float (&dk)[D / 8][4], float (&dv)[D / 8][4], float (&weight)[kPart][4],
                                         WeightsA<T, kPart>& weights, WeightsA<T, kPart>& of_ds, int first,
                                         const KeyBlocks<1>& blocks, int stage, int begin, const Tile<T, D>& k,
                                         const Tile<T, D>& v) const {
    const AttentionBwdKeysSm90Shared& at = p.at_keys_sm90;
    const float* lines = reinterpret_cast<const float*>(of_stage(stage, at.lines));
    const float* deltas = reinterpret_cast<const float*>(of_stage(stage, at.statistics));
    const Rows q{of_stage(stage, 0)}, grad{of_stage(stage, at.grad)};
    RowsA<T, D> rows_of_k(k, first);
    q.template start_products<true>(weight, rows_of_k, begin);
    if constexpr (!kBothAtOnce) wgmma_wait<0>(flat(weight));
    RowsA<T, D> rows_of_v(v, first);
    float ds[kPart][4];
    grad.template start_products<false>(ds, rows_of_v, begin);
    float2 line[2][kPart], delta[kPart];
    const auto load_lines = [&](int half) { load_pairs(lines + blocks.line(0, half) + begin, line[half]); };
    if constexpr (kEarly) load_lines(0), load_lines(1);
    wgmma_wait<1>(flat(weight));
    if constexpr (!kEarly) load_lines(0), load_lines(1);
#pragma unroll
    for (int j = 0; j < kPart; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* x = weight[j] + 2 * half;
        x[0] = exp2_approx(fmaf(x[0], p.to_powers, line[half][j].x));
        x[1] = exp2_approx(fmaf(x[1], p.to_powers, line[half][j].y));
      }
    load_pairs(deltas + begin, delta);
    weights.set(weight);
    grad.start_weighted(dv, weights, begin);
    wgmma_wait<1>(flat(ds));
#pragma unroll
    for (int j = 0; j < kPart; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ds[j][2 * half] = weight[j][2 * half] * (ds[j][2 * half] - delta[j].x);
        ds[j][2 * half + 1] = weight[j][2 * half + 1] * (ds[j][2 * half + 1] - delta[j].y);
      }
    of_ds.set(ds);
    q.start_weighted(dk, of_ds, begin);
  }

  // By a warp, with slots `first` and on of the block.
  __device__ __forceinline__ void consume(int first, const Tile<T, D>& k, const Tile<T, D>& v) const {
    float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
    const KeyBlocks<1> blocks(p, block.slots, first, kQueries);
    float weight[kPart][4];
    WeightsA<T, kPart> weights, of_ds;
    const int parts = tiles() * kParts;
    StageRing ring{p.at_keys_sm90.stage_count};
    mbarrier_wait(full, 0);
    start(weight, blocks, {of_stage(0, p.at_keys_sm90.columns)}, 0);
    for (int part = 0; part < parts; ++part) {
      const int stage = ring.stage, begin = part % kParts * kPart * 8;
      const bool ends = part % kParts == kParts - 1;
      absorb(dk[0], dv[0], weight, weights, of_ds, first, blocks, stage, begin, k, v);
      if (ends && part + 1 < parts) {
        ring.advance();
        mbarrier_wait(full + ring.stage, ring.parity);
      }
      // Of the next, while the last products are under way.
      start(weight, blocks, {of_stage(ring.stage, p.at_keys_sm90.columns)}, (part + 1) % kParts * kPart * 8);
      wgmma_wait<0>(flat(dv[0]), flat(dk[0]));
      if (ends) {
        fence_proxy_async();  // factors are read as TMA does not see
        arrive_as_warp(empty + stage);
      }
    }
    const auto token = [&](int row) { return block.slots.token(p.shape, block.slots.first + row); };
    store_slots(p, p.dk, dk, p.scale, k, first, block.place, token);
    store_slots(p, p.dv, dv, 1.f, v, first, block.place, token);
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kSm90Threads, 1)
    attention_bwd_keys_sm90_kernel(const __grid_constant__ AttentionBwdKeysSm90Params p) {
  RELPOS_DYNAMIC_SHARED_1024(shared);
  using At = AttentionBwdKeysSm90Shared;
  const Tile<T, D> k{reinterpret_cast<T*>(shared + p.at_keys_sm90.k)},
      v{reinterpret_cast<T*>(shared + p.at_keys_sm90.v)};
  KeysBlock& block = *reinterpret_cast<KeysBlock*>(shared);
  const AttentionBwdKeysSm90<T, D> work{p, block, shared + At::stages, reinterpret_cast<uint64_t*>(shared + At::full),
                                        reinterpret_cast<uint64_t*>(shared + At::empty)};
  if (threadIdx.x == 0) {
    block.fill<T>(p);
    init_stages(work.full, work.empty, p.at_keys_sm90.stage_count);
    mbarrier_fence_init();
  }
  __syncthreads();
  copy_slots(k, p, p.k, block);
  copy_slots(v, p, p.v, block);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  share_work([&](int warp) { work.consume(warp * 16, k, v); }, [&] { work.produce(); });
}

}  // namespace relpos
