// attention_bwd_queries_sm90.cuh - attention_bwd_queries.cuh with what sm_90 has; half precision, no class tokens.
//
//   the picture, grid, tile, bias: as in attention_fwd_sm90.cuh; the sums: tile/query_gradients.cuh.
//   products S, then <grad, v> while powers of two are taken of S, then dq; ds goes from registers to the product.
//   shared   before and after the keys of a span, their stages serve the factors.
//   barriers full, empty: as there. ready: the stages are free for the keys of a span, all eight warps say. Barrier 1,
//            of these warps: the last tile of a span is done with, or all factors of one are.
#pragma once
#include "tile/query_gradients.cuh"
#include "tile/sm90.cuh"

namespace relpos {

struct AttentionBwdQueriesSm90Params : AttentionBwdParams {
  TensorMap k_map, v_map;
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
struct AttentionBwdQueriesSm90 {
  // As there are registers: so many blocks of keys at a time, and whether <grad, v> begins while S is under way.
  static constexpr int kPart = D > 96 && BLOCKS == 8 ? 4 : BLOCKS;
  static constexpr bool kBothAtOnce = ONE_LINE && D <= 80;
  using Stages = Sm90Stages<T, D, BLOCKS>;
  using Sums = QueryGradients<T, D, BLOCKS, ONE_LINE, ONE_LINE>;
  const AttentionBwdQueriesSm90Params& p;
  const BlockPlace& block;
  const Stages stages;
  uint64_t *full, *empty, *ready;

  // By one thread.
  __device__ __forceinline__ void produce() const {
    StageRing ring{p.at_queries_sm90.stage_count};
    for (int i = 0; i < p.keys.spans; ++i) {
      mbarrier_wait(ready, i % 2);
      stages.load_span(p, block, i, ring, full, empty);
    }
  }

  // By all warps that have queries, when they have factors and no stage is in use.
  __device__ __forceinline__ void open_stages() const {
    const int covered = p.keys.lines * p.keys.columns;
    if (covered < BLOCKS * 8) {
      named_barrier_sync(1, kSm90Warps * 32);
      stages.clear(p.at_queries_sm90.stage_count, covered, kSm90Warps * 32);
    }
    fence_proxy_async();
    arrive_as_warp(ready);
  }

  // Blocks `begin` .. of a tile, whose column factors `weight` has: starts what they add to dq, of which ds must stay.
  __device__ __forceinline__ void absorb(Sums& mine, float (&weight)[kPart][4], WeightsA<T, kPart>& ds,
                                         const Span& span, int tile, int begin, int stage, const LineFactors<T>& lines,
                                         const LineGradients& dlines, const Tile<T, D>& q,
                                         const Tile<T, D>& grad) const {
    float dp[kPart][4], line[kPart][2];
    if constexpr (!ONE_LINE) mine.bias.load_lines(p, lines, span, tile, begin, line);
    RowsA<T, D> rows_of_q(q, mine.bias.first);
    stages.k(stage).template start_products<true>(weight, rows_of_q, begin * 8);
    if constexpr (!kBothAtOnce) wgmma_wait<0>(flat(weight));
    RowsA<T, D> rows_of_grad(grad, mine.bias.first);
    stages.v(stage).template start_products<false>(dp, rows_of_grad, begin * 8);
    if constexpr (ONE_LINE) mine.bias.load_lines(p, lines, span, tile, begin, line);
    wgmma_wait<1>(flat(weight));
#pragma unroll
    for (int j = 0; j < kPart; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        weight[j][e] = exp2_approx(fmaf(weight[j][e], p.to_powers, line[j][e / 2] + mine.offset[e / 2]));
    wgmma_wait<0>(flat(dp));
    mine.find_ds(begin, weight, dp);
    ds.set(dp);
    stages.k(stage).start_weighted(mine.dq[0], ds, begin * 8);
    if constexpr (!ONE_LINE) mine.add_lines(tile, begin, dlines, dp);
  }

  // The tiles of a span, each prepared while the last product of the one before is under way.
  __device__ __forceinline__ void absorb_span(Sums& mine, const Span& span, StageRing& ring,
                                              const LineFactors<T>& lines, const LineGradients& dlines,
                                              const Tile<T, D>& q, const Tile<T, D>& grad) const {
    float next[kPart][4];
    WeightsA<T, kPart> ds;
    mine.bias.start_columns(0, next);
    mbarrier_wait(full + ring.stage, ring.parity);
    for (int tile = 0; tile < p.keys.tiles; ++tile) {
      const int stage = ring.stage;
#pragma unroll
      for (int begin = 0; begin < BLOCKS; begin += kPart) {
        absorb(mine, next, ds, span, tile, begin, stage, lines, dlines, q, grad);
        const bool ends = begin + kPart == BLOCKS;
        if (ends) mine.end_tile(span, tile, dlines);
        mine.bias.start_columns(ends ? 0 : begin + kPart, next);
        if (ends) {
          ring.advance();
          if (tile + 1 < p.keys.tiles) mbarrier_wait(full + ring.stage, ring.parity);
        }
        wgmma_wait<0>(flat(mine.dq[0]));
      }
      arrive_as_warp(empty + stage);
    }
  }

  // By a warp, queries `first` and on; `stage`, and the table rows behind it: its own.
  __device__ __forceinline__ void consume(int first, const Coordinates* rows, const Tile<T, D>& q,
                                          const Tile<T, D>& grad, const LineFactors<T>& lines,
                                          const LineGradients& dlines, float* stage) const {
    constexpr float kOnes[2] = {1.f, 1.f};
    const Tile<T, D> table_rows{reinterpret_cast<T*>(stage + 16 * p.keys.staged)};
    Sums mine(p, block, rows, first);
    mine.begin(q, lines, stage);
    if (p.lines) mine.write_lines(lines, kOnes);
    StageRing ring{p.at_queries_sm90.stage_count};
    for (int i = 0; i < p.keys.spans; ++i) {
      const Span span = span_of(p, i);
      mine.begin_span(span, lines, q, stage);
      if (p.columns) mine.write_columns(span);
      open_stages();
      absorb_span(mine, span, ring, lines, dlines, q, grad);
      named_barrier_sync(1, kSm90Warps * 32);
      mine.end_span(span_of(p, static_cast<int>(afresh(i))), stage, table_rows);  // afresh: not kept through the loop
    }
    mine.end(dlines, stage, table_rows, q);
  }
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
__global__ void __launch_bounds__(kSm90Threads, 1)
    attention_bwd_queries_sm90_kernel(const __grid_constant__ AttentionBwdQueriesSm90Params p) {
  RELPOS_DYNAMIC_SHARED_1024(shared);
  using At = AttentionBwdQueriesSm90Shared;
  const At& at = p.at_queries_sm90;
  Coordinates* rows = reinterpret_cast<Coordinates*>(shared + At::rows);
  const Tile<T, D> q{reinterpret_cast<T*>(shared + at.q)}, grad{reinterpret_cast<T*>(shared + at.grad)};
  const LineFactors<T> lines{reinterpret_cast<Factor<T>*>(shared + at.lines), kSm90Rows,
                             reinterpret_cast<float*>(shared + At::largest)};
  const LineGradients dlines{reinterpret_cast<float*>(shared + at.dlines), dlines_ld(kSm90Rows)};
  const AttentionBwdQueriesSm90<T, D, BLOCKS, ONE_LINE> work{p,
                                                             *reinterpret_cast<const BlockPlace*>(shared),
                                                             {shared + At::stages},
                                                             reinterpret_cast<uint64_t*>(shared + At::full),
                                                             reinterpret_cast<uint64_t*>(shared + At::empty),
                                                             reinterpret_cast<uint64_t*>(shared + At::ready)};
  if (threadIdx.x == 0) {
    find_place(p, static_cast<int>(p.shape.M()), *reinterpret_cast<BlockPlace*>(shared));
    init_stages(work.full, work.empty, at.stage_count);
    mbarrier_init(work.ready, kSm90Warps);
    mbarrier_fence_init();
  }
  __syncthreads();
  copy_tokens(q, kSm90Rows, p, work.block, p.q, work.block.first, work.block.count);
  copy_tokens(grad, kSm90Rows, p, work.block, p.grad, work.block.first, work.block.count);
  cp_async_commit();
  locate_queries(p, work.block, kSm90Rows, rows);
  for (int i = threadIdx.x; i < p.keys.padded_lines * dlines.ld; i += kSm90Threads) dlines.data[i] = 0.f;
  cp_async_wait<0>();
  __syncthreads();

  const auto consume = [&](int warp) {
    unsigned char* const stage =
        shared + At::stages + warp * 16 * (p.keys.staged * 4 + Tile<T, D>::kLd * static_cast<int>(sizeof(T)));
    work.consume(warp * 16, rows, q, grad, lines, dlines, reinterpret_cast<float*>(stage));
  };
  share_work(consume, [&] { work.produce(); });
}

}  // namespace relpos
