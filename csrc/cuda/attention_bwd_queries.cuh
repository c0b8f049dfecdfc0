// attention_bwd_queries.cuh - the gradient of q and of the factors; queries stay, keys pass, as in the forward.
//
//   p[m, n]     = exp(score[m, n] - lse[m])              ds[m, n] = p[m, n] * (<grad[m], v[n]> - delta[m])
//   delta[m]    = <grad[m], out[m]>
//   dline[m, i] = sum of ds[m, n] over keys n of line i   dcolumn[m, j] = .. of column j
//   dq[m]       = scale * sum over n of ds[m, n] * k[n] + sum over axes a, keys i of d_a[m, i] * R_a[c(m), i]
//
//   the picture, grid, thread and barriers: as in attention_fwd.cuh, one strip of 16 queries per warp.
//
//   column gradients grow in registers, as the column factors lie there; line gradients in shared memory, each by the
//   one lane that owns the query. Every sum has a fixed order. What attention_bwd_keys.cuh needs of the factors is
//   written on the way, half precision below the largest column factor of the query.
#pragma once
#include "tile/factor_gradients.cuh"

namespace relpos {

template <typename T, int D, int BLOCKS, bool ONE_LINE>
struct AttentionBwdQueries {
  static constexpr int kPart = sizeof(T) == 4 || BLOCKS == 6 || D > 96 ? 2 : 4;  // blocks at a time
  static constexpr bool kLineInTile = ONE_LINE && D <= 96;  // the gradient of its line is summed in registers
  // What there are registers for: q and grad stay there, or are read again for every tile.
  using Bias = StripBias<T, BLOCKS, ONE_LINE>;
  using RowsOfQ = StripRows<T, D, sizeof(T) == 2 && D <= 80>;
  using RowsOfGrad = StripRows<T, D, sizeof(T) == 2 && D <= 64>;
  const AttentionBwdParams& p;
  const BlockPlace& block;
  const Coordinates* rows;
  Bias bias;
  float delta[2] = {}, offset[2];  // the latter of the exponents of this span, in powers of two
  float below[2];                  // the largest column factor
  float dline[2] = {};             // of the tile, where it is one line
  float dq[1][D / 8][4] = {};
  float dcolumn[BLOCKS][4];

  __device__ __forceinline__ AttentionBwdQueries(const AttentionBwdParams& p, const BlockPlace& block,
                                                 const Coordinates* rows, int first)
      : p(p), block(block), rows(rows) {
    bias.first = first;
  }

  // Of the query of this lane where a strip is spread over 16 lanes.
  __device__ __forceinline__ float of_lane(const float (&x)[2]) const {
    const int lane = threadIdx.x % 32, source = lane % 8 * 4;
    const float upper = __shfl_sync(~0u, x[0], source), lower = __shfl_sync(~0u, x[1], source);
    return lane % 16 < 8 ? upper : lower;
  }

  __device__ __forceinline__ void begin(const Tile<T, D>& q, const LineFactors<T>& lines, float* stage) {
    lines.fill(p, rows, q, bias.first, stage);
    largest_factors<T>(p, kW, rows, q, bias.first, below);
    const float of_lane = sizeof(T) == 2 ? find_delta<T>(p, block, bias.first) : 0.f;  // float32: use_measured
#pragma unroll
    for (int half = 0; half < 2; ++half) delta[half] = __shfl_sync(~0u, of_lane, 2 * (threadIdx.x % 32 / 4 + 8 * half));
  }
  // What is to be added to exponents: of class tokens, and of keys of lines, whose factors are below the largest.
  __device__ __forceinline__ float offset_of(bool of_lines, const LineFactors<T>& lines, int half) const {
    const int m = bias.row(half);
    const float lse = m < block.count ? p.lse[afresh(block.group * p.shape.M() + block.first + m)] : INFINITY;
    return fmaf(-lse, kLog2e, of_lines ? fmaf(below[half], kLog2e, lines.largest[m]) : 0.f);
  }

  // float32: lse and out are rounded, and what cancels in the formula would not cancel. So both are summed anew.
  LongSum<T> total[2], weighted[2];
  float factor[2] = {1.f, 1.f};  // of p
  __device__ __forceinline__ void measure(const Span& span, int tile, int begin, const LineFactors<T>& lines,
                                          const RowsOfQ& q, const RowsOfGrad& grad, const Tile<T, D>& k,
                                          const Tile<T, D>& v) {
    float weight[1][kPart][4], dp[1][kPart][4];
    weigh(span, tile, begin, lines, q, grad, k, v, weight, dp);
#pragma unroll
    for (int j = 0; j < kPart; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[e / 2].add(weight[0][j][e]);
        weighted[e / 2].add(weight[0][j][e] * dp[0][j][e]);
      }
  }
  __device__ __forceinline__ void use_measured() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = total[half].sum, products = weighted[half].sum;
      for (int x = 1; x < 4; x *= 2) {
        all += __shfl_xor_sync(~0u, all, x);
        products += __shfl_xor_sync(~0u, products, x);
      }
      if (bias.row(half) >= block.count) continue;
      factor[half] = 1.f / all;
      delta[half] = products * factor[half];
    }
  }

  __device__ __forceinline__ void write_lines(const LineFactors<T>& lines) const {
    const KeySlots slots(p.shape);
    const int64_t queries = padded_queries(p.shape);
    const int count = slots.lines(p.shape), lane = threadIdx.x % 32, row = bias.first + lane % 16;
    const float of_lines[2] = {offset_of(true, lines, 0), offset_of(true, lines, 1)};
    const float of_class[2] = {offset_of(false, lines, 0), offset_of(false, lines, 1)};
    const float all = of_lane(of_lines), no_bias = of_lane(of_class);
    const float own_delta = of_lane(delta), own_factor = of_lane(factor);
    if (block.first + row >= queries) return;
    float* to = p.lines + int64_t{block.group} * (count + statistics_of(sizeof(T))) * queries + block.first + row;
    for (int i = lane / 16; i < count; i += 2)
      to[i * queries] = i < slots.prefix_lines ? no_bias : all + to_float(lines.at(i - slots.prefix_lines, row));
    if (lane >= 16) return;
    to[count * queries] = own_delta;
    if constexpr (sizeof(T) == 4) to[(count + 1) * queries] = own_factor;
  }

  __device__ __forceinline__ void write_columns(const Span& span) const {
    const int lane = threadIdx.x % 32, ld = KeySlots(p.shape).line;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = bias.row(half);
      if (m >= block.count) continue;
      Factor<T>* to = static_cast<Factor<T>*>(p.columns) + (block.group * p.shape.M() + block.first + m) * ld;
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j)
        if (column_of(p.keys, span, j) < span.columns && p.keys.line_of[j] == 0)
          set_pair(to + span.first + column_of(p.keys, span, j) + lane % 4 * 2, bias.column[j][2 * half],
                   bias.column[j][2 * half + 1]);
    }
  }

  // p and <grad, v> of blocks `begin` .. of a tile.
  __device__ __forceinline__ void weigh(const Span& span, int tile, int begin, const LineFactors<T>& lines,
                                        const RowsOfQ& q, const RowsOfGrad& grad, const Tile<T, D>& k,
                                        const Tile<T, D>& v, float (&weight)[1][kPart][4],
                                        float (&dp)[1][kPart][4]) const {
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
                                         const Tile<T, D>& k, const Tile<T, D>& v) {
    float weight[1][kPart][4], dp[1][kPart][4];
    weigh(span, tile, begin, lines, q, grad, k, v, weight, dp);
#pragma unroll
    for (int j = 0; j < kPart; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dp[0][j][e] = weight[0][j][e] * (dp[0][j][e] - delta[e / 2]);
        dcolumn[begin + j][e] += dp[0][j][e];
        if (kLineInTile) dline[e / 2] += dp[0][j][e];
      }
    add_weighted(dq, dp, k, begin * 8, p.shape.D);
    if (!kLineInTile && span.of_lines) add_lines(tile, begin, dlines, dp[0]);
  }

  __device__ __forceinline__ void add_lines(int tile, int begin, const LineGradients& dlines,
                                            const float (&ds)[kPart][4]) const {
#pragma unroll
    for (int j = 0; j < kPart; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        add_line(dlines, tile * p.keys.lines + p.keys.line_of[begin + j], half, ds[j][2 * half] + ds[j][2 * half + 1]);
  }
  __device__ __forceinline__ void add_line(const LineGradients& dlines, int line, int half, float sum) const {
    for (int x = 1; x < 4; x *= 2) sum += __shfl_xor_sync(~0u, sum, x);
    if (threadIdx.x % 4 == 0) dlines.at(line, bias.row(half)) += sum;
  }
  __device__ __forceinline__ void end_tile(const Span& span, int tile, const LineGradients& dlines) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kLineInTile && span.of_lines) add_line(dlines, tile, half, dline[half]);
      dline[half] = 0.f;
    }
  }

  __device__ __forceinline__ void begin_span(const Span& span, const LineFactors<T>& lines, const Tile<T, D>& q,
                                             float* stage) {
#pragma unroll
    for (int half = 0; half < 2; ++half) offset[half] = offset_of(span.of_lines, lines, half);
    bias.fill_columns(p, span, rows, q, below, {0.f, 0.f}, stage);
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) dcolumn[j][e] = 0.f;
  }

  // Column gradients of a span that is over; `stage`: 16 rows.
  __device__ __forceinline__ void end_span(const Span& span, float* stage, const Tile<T, D>& table_rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = column_of(p.keys, span, j) + lane % 4 * 2 + e % 2, row = lane / 4 + e / 2 * 8;
        float& to = stage[row * Bias::kLd + at];
        if (at < span.columns) to = p.keys.line_of[j] ? to + dcolumn[j][e] : dcolumn[j][e];
      }
    __syncwarp();
    if (p.dfactors)
      write_factors(p, block, bias.first, kW, span.first, span.columns,
                    [&](int row, int i) { return stage[row * Bias::kLd + i]; });
    add_table_products(p, kW, {span.first, span.first + span.columns}, rows, bias.first, table_rows, dq,
                       [&](int row, int key) { return stage[row * Bias::kLd + key - span.first]; });
  }

  __device__ __forceinline__ void end(const LineGradients& dlines, const Tile<T, D>& table_rows, const Tile<T, D>& q) {
    end_lines(p, block, rows, bias.first, dlines, table_rows, dq);
    if (p.dq.data == nullptr) return;
    put_strip(q, bias.first, dq[0], p.scale);
    store_queries(q, bias.first, p, block, p.dq);
  }
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
__global__ void __launch_bounds__(kMostAttentionThreads, 1) attention_bwd_queries_kernel(const AttentionBwdParams p) {
  using Warp = AttentionBwdQueries<T, D, BLOCKS, ONE_LINE>;
  RELPOS_DYNAMIC_SHARED(shared);
  const AttentionBwdQueriesShared& at = p.at_queries;
  Coordinates* rows = reinterpret_cast<Coordinates*>(shared + at.rows);
  const auto q = [&] { return Tile<T, D>{reinterpret_cast<T*>(shared + afresh(at.q))}; };
  const auto grad = [&] { return Tile<T, D>{reinterpret_cast<T*>(shared + afresh(at.grad))}; };
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
  locate_queries(p.shape, block, p.block_rows, rows);
  for (int i = threadIdx.x; i < p.keys.padded_lines * dlines.ld; i += blockDim.x) dlines.data[i] = 0.f;
  cp_async_wait<0>();
  __syncthreads();

  Warp mine(p, block, rows, warp * 16);
  mine.begin(q(), lines, stage());
  SpanRows& span = *reinterpret_cast<SpanRows*>(shared + kPlaceBytes);
  const auto in_parts = [&](auto&& work) {
    return [&](int tile, const Tile<T, D>& k, const Tile<T, D>& v) {
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
    const auto measure = [&](int tile, int begin, const Tile<T, D>& k, const Tile<T, D>& v) {
      mine.measure(span, tile, begin, lines, own_q, own_grad, k, v);
    };
    keys.for_each_tile(p, block, span, begin_span, in_parts(measure), [](const Span&) {});
    mine.use_measured();
  }
  if (p.lines) mine.write_lines(lines);
  const auto begin_and_write = [&](const Span&) {
    begin_span(span);
    if (p.columns && span.of_lines) mine.write_columns(span);
  };
  const auto absorb = [&](int tile, int begin, const Tile<T, D>& k, const Tile<T, D>& v) {
    mine.absorb(span, tile, begin, lines, dlines, own_q, own_grad, k, v);
  };
  const auto end_span = [&](const Span&) {
    if (span.of_lines) mine.end_span(span, stage(), table_rows());
  };
  const auto absorb_tile = [&](int tile, const Tile<T, D>& k, const Tile<T, D>& v) {
    in_parts(absorb)(tile, k, v);
    mine.end_tile(span, tile, dlines);
  };
  keys.for_each_tile(p, block, span, begin_and_write, absorb_tile, end_span);
  mine.end(dlines, table_rows(), q());
}

}  // namespace relpos
