// query_gradients.cuh - the backward's sums for a warp's strip of 16 queries: dq, and what its factors get.
//
// Column gradients grow in registers, as the column factors lie there; line gradients in shared memory, each by the one
// lane that owns the query. Every sum has a fixed order. What the second kernel needs of the factors is written on the
// way, half precision below the largest column factor of the query.
#pragma once
#include "factor_gradients.cuh"

namespace relpos {

// LINE_IN_TILE: a tile is one line, whose gradient is summed in registers.
template <typename T, int D, int BLOCKS, bool ONE_LINE, bool LINE_IN_TILE>
struct QueryGradients {
  static_assert(ONE_LINE || !LINE_IN_TILE);
  using Bias = StripBias<T, BLOCKS, ONE_LINE>;
  using Rows = ProductTile<T, D>;
  const AttentionBwdParams& p;
  const BlockPlace& block;
  const Coordinates* rows;
  Bias bias;
  float delta[2] = {}, offset[2];  // the latter of the exponents of this span, in powers of two
  float below[2];                  // the largest column factor
  float dline[2] = {};             // of the tile, where it is one line
  float dq[1][D / 8][4] = {};
  float dcolumn[BLOCKS][4];

  __device__ __forceinline__ QueryGradients(const AttentionBwdParams& p, const BlockPlace& block,
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

  __device__ __forceinline__ void begin(const Rows& q, const LineFactors<T>& lines, float* stage) {
    lines.fill(p, rows, q, bias.first, stage);
    largest_factors(p, kW, rows, q, bias.first, below);
    const float of_lane = sizeof(T) == 2 ? find_delta<T, D>(p, block, bias.first) : 0.f;  // float32: use_measured
#pragma unroll
    for (int half = 0; half < 2; ++half) delta[half] = __shfl_sync(~0u, of_lane, 2 * (threadIdx.x % 32 / 4 + 8 * half));
  }
  // What is to be added to exponents: of class tokens, and of keys of lines, whose factors are below the largest.
  __device__ __forceinline__ float offset_of(bool of_lines, const LineFactors<T>& lines, int half) const {
    const int m = bias.row(half);
    const float lse = m < block.count ? p.lse[afresh(block.group * p.shape.M() + block.first + m)] : INFINITY;
    return fmaf(-lse, kLog2e, of_lines ? fmaf(below[half], kLog2e, lines.largest[m]) : 0.f);
  }

  // `factor`: of p, in float32.
  __device__ __forceinline__ void write_lines(const LineFactors<T>& lines, const float (&factor)[2]) const {
    const KeySlots slots(p.shape);
    const int64_t queries = padded_queries(p.shape);
    const int count = slots.lines(p.shape), lane = threadIdx.x % 32, row = bias.first + lane % 16;
    const float of_lines[2] = {offset_of(true, lines, 0), offset_of(true, lines, 1)};
    const float of_class[2] = {offset_of(false, lines, 0), offset_of(false, lines, 1)};
    const float all = of_lane(of_lines), no_bias = of_lane(of_class);
    const float own_delta = of_lane(delta), own_factor = of_lane(factor);
    if (block.first + row >= queries) return;
    float* to = p.lines + int64_t{block.group} * (count + statistics_of(sizeof(T))) * queries + block.first + row;
    const int part = lane / 16, with_keys = count - slots.prefix_lines;
    for (int i = part; i < slots.prefix_lines; i += 2) to[i * queries] = no_bias;
    float* of_line = to + (slots.prefix_lines + part) * queries;
#pragma unroll 4
    for (int i = part; i < with_keys; i += 2, of_line += 2 * queries) *of_line = all + to_float(lines.at(i, row));
    if (part != 0) return;
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

  // Blocks `begin` .. of a tile: p and <grad, v>, in whose place it leaves ds, which is to be added to dq.
  template <int PART>
  __device__ __forceinline__ void find_ds(int begin, const float (&weight)[PART][4], float (&dp)[PART][4]) {
#pragma unroll
    for (int j = 0; j < PART; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dp[j][e] = weight[j][e] * (dp[j][e] - delta[e / 2]);
        dcolumn[begin + j][e] += dp[j][e];
        if (LINE_IN_TILE) dline[e / 2] += dp[j][e];
      }
  }
  template <int PART>
  __device__ __forceinline__ void add_lines(int tile, int begin, const LineGradients& dlines,
                                            const float (&ds)[PART][4]) const {
#pragma unroll
    for (int j = 0; j < PART; ++j)
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
      if (LINE_IN_TILE && span.of_lines) add_line(dlines, tile, half, dline[half]);
      dline[half] = 0.f;
    }
  }

  __device__ __forceinline__ void begin_span(const Span& span, const LineFactors<T>& lines, const Rows& q,
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
    add_table_products<true>(p, kW, {span.first, span.first + span.columns}, rows, bias.first, table_rows, dq,
                             [&](int row, int key) { return stage[row * Bias::kLd + key - span.first]; });
  }

  __device__ __forceinline__ void end(const LineGradients& dlines, float* stage, const Tile<T, D>& table_rows,
                                      const Rows& q) {
    end_lines<true>(p, block, rows, bias.first, dlines, stage, table_rows, dq);
    if (p.dq.data == nullptr) return;
    const int first = static_cast<int>(afresh(bias.first));
    const Tile<T, D> results = in_place_of(q, first);
    put_strip(results, first, dq[0], p.scale);
    store_queries(results, first, p, block, p.dq);
  }
};

}  // namespace relpos
