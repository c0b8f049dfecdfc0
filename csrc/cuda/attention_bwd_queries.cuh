// attention_bwd_queries.cuh - the gradient of q and of the factors; queries stay, keys pass, as in the forward.
//
//   p[m, n]     = exp(score[m, n] - lse[m])              ds[m, n] = p[m, n] * (<grad[m], v[n]> - delta[m])
//   delta[m]    = <grad[m], out[m]>
//   dline[m, i] = sum of ds[m, n] over keys n of line i   dcolumn[m, j] = .. of column j
//   dq[m]       = scale * sum over n of ds[m, n] * k[n] + sum over axes a, keys i of d_a[m, i] * R_a[c(m), i]
//
//   the picture, grid, thread and barriers: as in attention_fwd.cuh, one strip of 16 queries per warp; the sums:
//   tile/query_gradients.cuh.
#pragma once
#include "tile/long_sum.cuh"
#include "tile/query_gradients.cuh"

namespace relpos {

template <typename T, int D, int BLOCKS, bool ONE_LINE>
struct AttentionBwdQueries : QueryGradients<T, D, BLOCKS, ONE_LINE, ONE_LINE && D <= 96> {
  static constexpr int kPart = sizeof(T) == 4 || BLOCKS == 6 || D > 96 ? 2 : 4;  // blocks at a time
  static constexpr bool kLineInTile = ONE_LINE && D <= 96;
  using Sums = QueryGradients<T, D, BLOCKS, ONE_LINE, kLineInTile>;
  using Sums::Sums, Sums::p, Sums::block, Sums::bias, Sums::delta, Sums::offset, Sums::dq;
  using typename Sums::Rows;
  // What there are registers for: q and grad stay there, or are read again for every tile.
  using RowsOfQ = StripRows<Rows, sizeof(T) == 2 && D <= 80>;
  using RowsOfGrad = StripRows<Rows, sizeof(T) == 2 && D <= 64>;

  // float32: lse and out are rounded, and what cancels in the formula would not cancel. So both are summed anew.
  Sum<T> total[2] = {}, weighted[2] = {};
  float factor[2] = {1.f, 1.f};  // of p
  __device__ __forceinline__ void measure(const Span& span, int tile, int begin, const LineFactors<T>& lines,
                                          const RowsOfQ& q, const RowsOfGrad& grad, const Rows& k, const Rows& v) {
    float weight[1][kPart][4], dp[1][kPart][4];
    weigh(span, tile, begin, lines, q, grad, k, v, weight, dp);
#pragma unroll
    for (int j = 0; j < kPart; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[e / 2] += weight[0][j][e];
        weighted[e / 2] += weight[0][j][e] * dp[0][j][e];
      }
  }
  __device__ __forceinline__ void use_measured() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = total[half], products = weighted[half];
      for (int x = 1; x < 4; x *= 2) {
        all += __shfl_xor_sync(~0u, all, x);
        products += __shfl_xor_sync(~0u, products, x);
      }
      if (bias.row(half) >= block.count) continue;
      factor[half] = 1.f / all;
      delta[half] = products * factor[half];
    }
  }

  // p and <grad, v> of blocks `begin` .. of a tile.
  __device__ __forceinline__ void weigh(const Span& span, int tile, int begin, const LineFactors<T>& lines,
                                        const RowsOfQ& q, const RowsOfGrad& grad, const Rows& k, const Rows& v,
                                        float (&weight)[1][kPart][4], float (&dp)[1][kPart][4]) const {
    float line[kPart][2];
    bias.start(p, lines, span, tile, begin, weight[0], line);
    add_products(weight, q, k, begin * 8, p.shape.D);
#pragma unroll
    for (int j = 0; j < kPart; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weight[0][j][e] = exp2_approx(fmaf(weight[0][j][e], p.to_powers, line[j][e / 2] + offset[e / 2]));
        if constexpr (sizeof(T) == 4) weight[0][j][e] *= factor[e / 2];
        dp[0][j][e] = 0.f;
      }
    add_products(dp, grad, v, begin * 8, p.shape.D);
  }

  __device__ __forceinline__ void absorb(const Span& span, int tile, int begin, const LineFactors<T>& lines,
                                         const LineGradients& dlines, const RowsOfQ& q, const RowsOfGrad& grad,
                                         const Rows& k, const Rows& v) {
    float weight[1][kPart][4], dp[1][kPart][4];
    weigh(span, tile, begin, lines, q, grad, k, v, weight, dp);
    this->find_ds(begin, weight[0], dp[0]);
    add_weighted(dq, dp, k, begin * 8, p.shape.D);
    if (!kLineInTile && span.of_lines) this->add_lines(tile, begin, dlines, dp[0]);
  }
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
__global__ void __launch_bounds__(kMostAttentionThreads, 1) attention_bwd_queries_kernel(const AttentionBwdParams p) {
  using Warp = AttentionBwdQueries<T, D, BLOCKS, ONE_LINE>;
  using Rows = typename Warp::Rows;
  RELPOS_DYNAMIC_SHARED(shared);
  const AttentionBwdQueriesShared& at = p.at_queries;
  Coordinates* rows = reinterpret_cast<Coordinates*>(shared + at.rows);
  const auto q = [&] { return Rows{reinterpret_cast<decltype(Rows::data)>(shared + afresh(at.q))}; };
  const auto grad = [&] { return Rows{reinterpret_cast<decltype(Rows::data)>(shared + afresh(at.grad))}; };
  const KeyStages<T, D, BLOCKS> keys{reinterpret_cast<T*>(shared + at.keys)};
  const LineFactors<T> lines{reinterpret_cast<Factor<T>*>(shared + at.lines), p.block_rows,
                             reinterpret_cast<float*>(shared + at.largest)};
  const LineGradients dlines{reinterpret_cast<float*>(shared + at.dlines), dlines_ld(p.block_rows)};
  const int warp = threadIdx.x / 32;
  const int staged = 16 * p.keys.staged;
  const auto stage = [&] {
    return reinterpret_cast<float*>(shared + at.keys + afresh(warp) * (staged * 4 + 16 * Tile<T, D>::kLd * sizeof(T)));
  };
  const auto table_rows = [&] { return Tile<T, D>{reinterpret_cast<T*>(stage() + staged)}; };

  if (threadIdx.x == 0) find_place(p, static_cast<int>(p.shape.M()), *reinterpret_cast<BlockPlace*>(shared));
  __syncthreads();
  const BlockPlace& block = *reinterpret_cast<const BlockPlace*>(shared);
  copy_tokens(q(), p.block_rows, p, block, p.q, block.first, block.count);
  copy_tokens(grad(), p.block_rows, p, block, p.grad, block.first, block.count);
  cp_async_commit();
  locate_queries(p, block, p.block_rows, rows);
  for (int i = threadIdx.x; i < p.keys.padded_lines * dlines.ld; i += blockDim.x) dlines.data[i] = 0.f;
  cp_async_wait<0>();
  __syncthreads();

  Warp mine(p, block, rows, warp * 16);
  mine.begin(q(), lines, stage());
  SpanRows& span = *reinterpret_cast<SpanRows*>(shared + kPlaceBytes);
  const auto in_parts = [&](auto&& work) {
    return [&](int tile, const Rows& k, const Rows& v) {
      for_each_part<BLOCKS, Warp::kPart, ONE_LINE>(p, block, mine.bias.first, span, tile,
                                                   [&](int begin) { work(tile, begin, k, v); });
    };
  };
  typename Warp::RowsOfQ own_q(q(), mine.bias.first);
  typename Warp::RowsOfGrad own_grad(grad(), mine.bias.first);
  const auto begin_span = [&](const Span&) {
    mine.begin_span(span, lines, q(), stage());
    own_q.hold(q()), own_grad.hold(grad());
  };
  if constexpr (sizeof(T) == 4) {
    const auto measure = [&](int tile, int begin, const Rows& k, const Rows& v) {
      mine.measure(span, tile, begin, lines, own_q, own_grad, k, v);
    };
    keys.for_each_tile(p, block, span, begin_span, in_parts(measure), [](const Span&) {});
    mine.use_measured();
  }
  if (p.lines) mine.write_lines(lines, mine.factor);
  const auto begin_and_write = [&](const Span&) {
    begin_span(span);
    if (p.columns && span.of_lines) mine.write_columns(span);
  };
  const auto absorb = [&](int tile, int begin, const Rows& k, const Rows& v) {
    mine.absorb(span, tile, begin, lines, dlines, own_q, own_grad, k, v);
  };
  const auto end_span = [&](const Span&) {
    if (span.of_lines) mine.end_span(span, stage(), table_rows());
  };
  const auto absorb_tile = [&](int tile, const Rows& k, const Rows& v) {
    in_parts(absorb)(tile, k, v);
    mine.end_tile(span, tile, dlines);
  };
  keys.for_each_tile(p, block, span, begin_and_write, absorb_tile, end_span);
  mine.end(dlines, stage(), table_rows(), q());
}

}  // namespace relpos
