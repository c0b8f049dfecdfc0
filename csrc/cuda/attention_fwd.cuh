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
//   barriers one per tile: it has arrived, and the one before is done with. One more before a span overwrites all.
//
// The largest score of a query need not be exact: it is renewed only when it has grown by kMayGrow powers of two.
#pragma once
#include "tile/factors.cuh"

namespace relpos {

constexpr float kMayGrow = 8.f;

template <typename T, int D, int BLOCKS, bool ONE_LINE>
struct AttentionFwd {
  static constexpr int kStrips = strips_of(sizeof(T), D);
  // As many as there are registers for: blocks at a time, and strips of queries that stay there.
  static constexpr int kHeld = sizeof(T) == 4 ? 0 : D == 64 ? kStrips : 1;
  static constexpr int kPart = sizeof(T) == 4 || BLOCKS == 6 || kStrips == 2 ? 2 : 4;
  float out[kStrips][D / 8][4] = {};
  float reference[kStrips][2];  // a power of two
  LongSum<T> sum[kStrips][2];

  __device__ __forceinline__ AttentionFwd() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) reference[s][0] = reference[s][1] = -INFINITY;
  }

  // Scores, and what their lines add; returns with weights in their place.
  __device__ __forceinline__ void absorb(const AttentionFwdParams& p, float (&score)[kStrips][kPart][4],
                                         const float (&line)[kStrips][kPart][2], const Tile<T, D>& v, int v_row) {
    renew_reference(score, line, p.to_powers);
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int j = 0; j < kPart; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          score[s][j][e] = exp2_approx(fmaf(score[s][j][e], p.to_powers, line[s][j][e / 2] - reference[s][e / 2]));
          sum[s][e / 2].add(score[s][j][e]);
        }
    add_weighted(out, score, v, v_row, p.shape.D);
  }

  __device__ __forceinline__ void renew_reference(const float (&score)[kStrips][kPart][4],
                                                  const float (&line)[kStrips][kPart][2], float to_powers) {
    float most[kStrips][2];
    bool grown = false;
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto of_block = [&](int j) {
          const float x = fmaxf(score[s][j][2 * half], score[s][j][2 * half + 1]);
          return ONE_LINE ? x : fmaf(x, to_powers, line[s][j][half]);
        };
        float x = of_block(0);
#pragma unroll
        for (int j = 1; j < kPart; ++j) x = fmaxf(x, of_block(j));
        most[s][half] = ONE_LINE ? fmaf(x, to_powers, line[s][0][half]) : x;
        grown |= most[s][half] - reference[s][half] > kMayGrow;
      }
    if (!__any_sync(~0u, grown)) return;
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = fmaxf(most[s][half], reference[s][half]);
        for (int d = 1; d < 4; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
        const float shrink = exp2_approx(reference[s][half] - x);
        reference[s][half] = x;
        sum[s][half].scale(shrink);
#pragma unroll
        for (int d = 0; d < D / 8; ++d) out[s][d][2 * half] *= shrink, out[s][d][2 * half + 1] *= shrink;
      }
  }

  // Strip s; `rows` is a tile of the block's queries, of which the warp takes its own.
  __device__ __forceinline__ void store(const AttentionFwdParams& p, const BlockPlace& block, int s, int first,
                                        const float* largest, const Tile<T, D>& rows) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[s][half].sum;
      for (int d = 1; d < 4; d *= 2) total += __shfl_xor_sync(~0u, total, d);
      const int m = first + lane / 4 + half * 8;
      if (p.lse && lane % 4 == 0 && m < block.count)
        p.lse[block.group * p.shape.M() + block.first + m] = (reference[s][half] + largest[m] + log2f(total)) * kLn2;
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        set_pair(rows.at(m, d * 8 + lane % 4 * 2), out[s][d][2 * half] / total, out[s][d][2 * half + 1] / total);
    }
    __syncwarp();
    store_queries(rows, first, p, block, p.out);
  }
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
__global__ void __launch_bounds__(kMostAttentionThreads, 1) attention_fwd_kernel(const AttentionFwdParams p) {
  using Warp = AttentionFwd<T, D, BLOCKS, ONE_LINE>;
  using Bias = StripBias<T, BLOCKS, ONE_LINE>;
  constexpr int kStrips = Warp::kStrips;
  constexpr float kNothing[2] = {};
  RELPOS_DYNAMIC_SHARED(shared);
  const AttentionFwdShared& at = p.at;
  Coordinates* rows = reinterpret_cast<Coordinates*>(shared + at.rows);
  const auto q = [&] { return Tile<T, D>{reinterpret_cast<T*>(shared + afresh(at.q))}; };
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
  locate_queries(p.shape, block, p.block_rows, rows);
  cp_async_wait<0>();
  __syncthreads();

  Warp mine;
  Bias bias[kStrips];
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    bias[s].first = first + s * 16;
    lines.fill(p, rows, q(), bias[s].first, stage());
  }
  Span& span = *reinterpret_cast<Span*>(shared + kPlaceBytes);
  StripRows<T, D, Warp::kHeld> queries(q(), first);
  const auto begin_span = [&](const Span&) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const float* largest = lines.largest + bias[s].row(0);  // what line factors are below
      const float of_class[2] = {-largest[0] * p.from_powers, -largest[8] * p.from_powers};
      bias[s].fill_columns(p, span, rows, q(), kNothing, of_class, stage());
    }
    queries.hold(q());
  };
  const auto absorb = [&](int tile, const Tile<T, D>& k, const Tile<T, D>& v) {
    for_each_part<BLOCKS, Warp::kPart, ONE_LINE>(p, block, first, span, tile, [&](int begin) {
      float score[kStrips][Warp::kPart][4], line[kStrips][Warp::kPart][2];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) bias[s].start(p, lines, span, tile, begin, score[s], line[s]);
      add_products(score, queries, k, begin * 8, p.shape.D);
      mine.absorb(p, score, line, v, begin * 8);
    });
  };
  keys.for_each_tile(p, block, span, begin_span, absorb, [](const Span&) {});
#pragma unroll
  for (int s = 0; s < kStrips; ++s)
    mine.store(p, block, s, static_cast<int>(afresh(first + s * 16)), lines.largest, q());
}

}  // namespace relpos
