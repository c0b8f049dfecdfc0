// attention_fwd.cuh - attention with a decomposed bias; the M x N scores are never stored.
//
//   score[m, n] = scale * (<q[m], k[n]> + column[m, j] / scale) + line[m, i]      n in line i, column j
//   out[m]      = sum over n of softmax(score[m, :])[n] * v[n]
//   lse[m]      = log of the sum over n of exp(score[m, n])
//
//                     keys, a tile per step --->
//                  +---------+---------+---------+
//   16 or 32       | line 0  | line 1  | ..      |     line factors: one number per query and line, shared memory
//   queries        |         |         |         |     column factors: the same in every tile, registers, where the
//   per warp       +---------+---------+---------+                    products with the keys start from
//
//   grid     (groups * ceil(M / block_rows)), the blocks of a group next to each other: they share its keys in L2.
//   thread   lane 4 g + t of a warp: queries g and g + 8 of each strip, columns 2t and 2t + 1 of each block of 8.
//   shared   coordinates and q of the block; two stages of k and v, before them the column factors; line factors.
//   barriers one per tile: it has arrived, and the one before is done with; in float32 one more: it has been split. One
//            more before a span overwrites all.
#pragma once
#include "tile/softmax.cuh"

namespace relpos {

template <typename T, int D, int BLOCKS, bool ONE_LINE>
__global__ void __launch_bounds__(kMostAttentionThreads, 1) attention_fwd_kernel(const AttentionFwdParams p) {
  using Bias = StripBias<T, BLOCKS, ONE_LINE>;
  constexpr int kStrips = strips_of(sizeof(T), D);
  // As many as there are registers for: blocks at a time, and strips of queries that stay there.
  constexpr int kHeld = sizeof(T) == 4 ? 0 : D == 64 ? kStrips : 1;
  constexpr int kPart = sizeof(T) == 4 || BLOCKS == 6 || kStrips == 2 ? 2 : 4;
  constexpr float kNothing[2] = {};
  RELPOS_DYNAMIC_SHARED(shared);
  const AttentionFwdShared& at = p.at;
  Coordinates* rows = reinterpret_cast<Coordinates*>(shared + at.rows);
  using Rows = ProductTile<T, D>;
  const auto q = [&] { return Rows{reinterpret_cast<decltype(Rows::data)>(shared + afresh(at.q))}; };
  const KeyStages<T, D, BLOCKS> keys{reinterpret_cast<T*>(shared + at.keys)};
  const LineFactors<T> lines{reinterpret_cast<Factor<T>*>(shared + at.lines), p.block_rows,
                             reinterpret_cast<float*>(shared + at.largest)};
  const int first = threadIdx.x / 32 * 16 * kStrips;
  const auto stage = [&] { return reinterpret_cast<float*>(keys.data) + threadIdx.x / 32 * 16 * p.keys.staged; };

  if (threadIdx.x == 0) find_place(p, static_cast<int>(p.shape.M()), *reinterpret_cast<BlockPlace*>(shared));
  __syncthreads();
  const BlockPlace& block = *reinterpret_cast<const BlockPlace*>(shared);
  copy_tokens(q(), p.block_rows, p, block, p.q, block.first, block.count);
  cp_async_commit();
  locate_queries(p, block, p.block_rows, rows);
  cp_async_wait<0>();
  __syncthreads();

  OnlineSoftmax<T, D, kStrips, kPart, ONE_LINE> mine;
  Bias bias[kStrips];
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    bias[s].first = first + s * 16;
    lines.fill(p, rows, q(), bias[s].first, stage());
  }
  SpanRows& span = *reinterpret_cast<SpanRows*>(shared + kPlaceBytes);
  StripRows<Rows, kHeld> queries(q(), first);
  const auto begin_span = [&](const Span&) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const float* largest = lines.largest + bias[s].row(0);  // what line factors are below
      const float of_class[2] = {-largest[0] * p.from_powers, -largest[8] * p.from_powers};
      bias[s].fill_columns(p, span, rows, q(), kNothing, of_class, stage());
    }
    queries.hold(q());
  };
  const auto absorb = [&](int tile, const Rows& k, const Rows& v) {
    for_each_part<BLOCKS, kPart, ONE_LINE>(p, block, first, span, tile, [&](int begin) {
      float score[kStrips][kPart][4], line[kStrips][kPart][2];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) bias[s].start(p, lines, span, tile, begin, score[s], line[s]);
      add_products(score, queries, k, begin * 8, p.shape.D);
      mine.weigh(p, score, line);
      add_weighted(mine.out, score, v, begin * 8, p.shape.D);
    });
  };
  keys.for_each_tile(p, block, span, begin_span, absorb, [](const Span&) {});
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    const int strip = static_cast<int>(afresh(first + s * 16));
    mine.store(p, block, s, strip, in_place_of(q(), strip), [&](int m) { return lines.largest[m]; });
  }
}

}  // namespace relpos
