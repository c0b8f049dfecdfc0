// attention_fwd_sm90.cuh - the forward of attention_fwd.cuh with what sm_90 has: TMA brings keys, warpgroups multiply.
//
//   warps 0 - 3   a warpgroup: queries 0 .. 63 of the block, a strip of 16 per warp
//   warps 4 - 7   another: queries 64 .. 127. Nothing but the copies joins them: one multiplies while one takes powers
//   warps 8 - 11  one thread asks TMA for one tile of keys and values after another; they give their registers away
//
//   grid     (groups * ceil(M / 128)), the blocks of a group next to each other: they share its keys in L2.
//   tile     a box of the keys, [D, columns of the span, lines of the tile]: rows as in attention_fwd.cuh. What lies
//            past the last column, the last line or D is zero. Each 64 elements of D are a matrix of rows of 128 bytes,
//            swizzled; k is K-major, v is MN-major to wgmma.
//   bias     as there: scores start from the column factors, which wgmma accumulates to.
//   barriers full[s]: k and v of stage s have arrived. empty[s]: all eight warps are done with them.
#pragma once
#include "tile/sm90.cuh"
#include "tile/softmax.cuh"

namespace relpos {

struct AttentionFwdSm90Params : AttentionFwdParams {
  TensorMap k_map, v_map;
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
struct AttentionFwdSm90 {
  using Stages = Sm90Stages<T, D, BLOCKS>;
  using Softmax = OnlineSoftmax<T, D, 1, BLOCKS, true>;
  const AttentionFwdSm90Params& p;
  const BlockPlace& block;
  const Stages stages;
  uint64_t *full, *empty;

  // Scores must be moved to what products are added to: many lines join them on the way, and cost nothing after.
  __device__ __forceinline__ void start_from_lines(const StripBias<T, BLOCKS, ONE_LINE>& bias,
                                                   float (&score)[BLOCKS][4], float (&line)[BLOCKS][2]) const {
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        score[j][e] = kWithBias ? fmaf(line[j][e / 2], p.from_powers, bias.column[j][e]) : 0.f;
      line[j][0] = line[j][1] = 0.f;
    }
  }

  // By one thread.
  __device__ __forceinline__ void produce() const {
    StageRing ring{p.at_sm90.stage_count};
    for (int i = 0; i < p.keys.spans; ++i) stages.load_span(p, block, i, ring, full, empty);
  }

  // What a warp has of the tile before: weights, whose values are to be added, the stage that these are in, and the
  // queries, anew for every tile: kept, ptxas up to 13.0 gives their registers away.
  struct Pending {
    WeightsA<T, BLOCKS> weights;
    RowsA<T, D> rows_of_q;
    int stage;
  };

  __device__ __forceinline__ void finish(Softmax& mine, const Pending& before) const {
    wgmma_wait<0>(flat(mine.out[0]));
    arrive_as_warp(empty + before.stage);
  }

  // The weights of a tile, while the values of the one before in the span are added.
  template <bool FIRST>
  __device__ __forceinline__ void step(Softmax& mine, Pending& before, const StripBias<T, BLOCKS, ONE_LINE>& bias,
                                       const LineFactors<T>& lines, const Span& span, int tile, const Tile<T, D>& q,
                                       const StageRing& ring) const {
    float score[1][BLOCKS][4], line[1][BLOCKS][2];
    bias.load_lines(p, lines, span, tile, 0, line[0]);
    mbarrier_wait(full + ring.stage, ring.parity);
    if constexpr (ONE_LINE)
      bias.start_columns(0, score[0]);
    else
      start_from_lines(bias, score[0], line[0]);
    stages.k(ring.stage).template start_products<true>(score[0], before.rows_of_q, 0);
    if constexpr (!FIRST) stages.v(before.stage).start_weighted(mine.out[0], before.weights, 0);
    wgmma_wait<!FIRST>(flat(score[0]));
    mine.renew_reference(score, line, p.to_powers, [&] {
      if constexpr (!FIRST) finish(mine, before);
    });
    before.rows_of_q.load(q, bias.first);
    mine.take_powers(p, score, line);
    before.weights.set(score[0]);
    before.stage = ring.stage;
  }

  // By a warp, queries `first` and on; `stage`: its own.
  __device__ __forceinline__ void consume(int first, const Coordinates* rows, const Tile<T, D>& q,
                                          const LineFactors<T>& lines, float* stage) const {
    constexpr float kNothing[2] = {};
    Softmax mine;
    StripBias<T, BLOCKS, ONE_LINE> bias;
    bias.first = first;
    lines.fill(p, rows, q, first, stage);
    Pending before;
    StageRing ring{p.at_sm90.stage_count};
    for (int i = 0; i < p.keys.spans; ++i) {
      const Span span = span_of(p, i);
      bias.fill_columns(p, span, rows, q, kNothing, kNothing, stage);
      before.rows_of_q.load(q, first);
      step<true>(mine, before, bias, lines, span, 0, q, ring);
      ring.advance();
      for (int tile = 1; tile < p.keys.tiles; ++tile, ring.advance())
        step<false>(mine, before, bias, lines, span, tile, q, ring);
      stages.v(before.stage).start_weighted(mine.out[0], before.weights, 0);
      finish(mine, before);
    }
    mine.store(p, block, 0, first, q, [&](int m) { return lines.largest[m]; });
  }
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
__global__ void __launch_bounds__(kSm90Threads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ AttentionFwdSm90Params p) {
  RELPOS_DYNAMIC_SHARED_1024(shared);
  using At = AttentionFwdSm90Shared;
  const At& at = p.at_sm90;
  Coordinates* rows = reinterpret_cast<Coordinates*>(shared + At::rows);
  const Tile<T, D> q{reinterpret_cast<T*>(shared + at.q)};
  const LineFactors<T> lines{reinterpret_cast<Factor<T>*>(shared + at.lines), kSm90Rows,
                             reinterpret_cast<float*>(shared + At::largest)};
  const AttentionFwdSm90<T, D, BLOCKS, ONE_LINE> work{p,
                                                      *reinterpret_cast<const BlockPlace*>(shared),
                                                      {shared + At::stages},
                                                      reinterpret_cast<uint64_t*>(shared + At::full),
                                                      reinterpret_cast<uint64_t*>(shared + At::empty)};
  if (threadIdx.x == 0) {
    find_place(p, static_cast<int>(p.shape.M()), *reinterpret_cast<BlockPlace*>(shared));
    init_stages(work.full, work.empty, at.stage_count);
    mbarrier_fence_init();
  }
  if (p.keys.lines * p.keys.columns < BLOCKS * 8) {
    work.stages.clear(at.stage_count, p.keys.lines * p.keys.columns, kSm90Threads);
    fence_proxy_async();
  }
  __syncthreads();
  copy_tokens(q, kSm90Rows, p, work.block, p.q, work.block.first, work.block.count);
  cp_async_commit();
  locate_queries(p, work.block, kSm90Rows, rows);
  cp_async_wait<0>();
  __syncthreads();

  const auto consume = [&](int warp) {
    float* const stage = reinterpret_cast<float*>(shared + at.staged) + warp * 16 * p.keys.staged;
    work.consume(warp * 16, rows, q, lines, stage);
  };
  share_work(consume, [&] { work.produce(); });
}

}  // namespace relpos
