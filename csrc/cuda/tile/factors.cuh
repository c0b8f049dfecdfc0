// factors.cuh - the bias of a warp's queries: per line of keys in shared memory, per column in registers.
//
// As in bias.cuh, queries times the range of table rows that they use, and every element to the key that uses that row.
// What is kept per line is relative to the largest of its query: softmax does not mind, half precision is then
// exact enough where it matters, and nothing overflows.
#pragma once
#include "rows.cuh"
#include "tokens.cuh"

namespace relpos {

#ifdef RELPOS_WITHOUT_BIAS  // tests/test_sass.py: what the bias costs in the loop
constexpr bool kWithBias = false;
#else
constexpr bool kWithBias = true;
#endif

// Keys of an axis: begin .. end - 1.
struct KeyRange {
  int begin, end;
};

// The table rows that 16 queries use for these keys of an axis: first + (i << step) for i = 0 .. last, none if no query
// has a bias. What finer queries of one coordinate do not use is left out.
struct UsedRows {
  int first = 0, last = -1, step = 0;
  int k_shift, origin[2];  // as those of the axis and of a lane's two queries, with i as the row

  __device__ __forceinline__ UsedRows(const AttentionParams& p, int a, const KeyRange& keys, const Coordinates* rows) {
    const Axis& axis = p.shape.axis[a];
    const int lane = threadIdx.x % 32, c = rows[lane % 16].of[a];
    int least = c < 0 ? axis.queries : c, most = c;
    for (int x = 8; x; x /= 2) {
      least = min(least, __shfl_xor_sync(~0u, least, x));
      most = max(most, __shfl_xor_sync(~0u, most, x));
    }
    if (most >= 0) {
      first = row_of(axis, p.index, least, keys.end - 1);
      step = least == most ? max(axis.k_shift, 0) : 0;
      last = (row_of(axis, p.index, most, keys.begin) - first) >> step;
    }
    k_shift = axis.k_shift - step;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int of_query = origin_of(axis, rows[lane / 4 + half * 8].of[a]);
      origin[half] = axis.k_shift >= 0 ? (of_query - first) >> step : of_query < 0 ? -1 : of_query + first;
    }
  }
  // Rows past the last count as that one.
  template <typename T>
  __device__ __forceinline__ const T* row(const AttentionParams& p, int i) const {
    const uint32_t width = p.shape.D << step;
    return table_row<T>(p.table, p.shape, first) + uint64_t{static_cast<uint32_t>(min(i, last))} * width;
  }
  // Of products with rows i0 and on, as tensor cores leave them, in blocks of 8.
  template <int COUNT>
  __device__ __forceinline__ void find_keys(const int32_t* index, int (&key)[COUNT], int i0) const {
    relpos::find_keys(
        *this, index, last, key, [&](int i) { return origin[i % 4 / 2]; },
        [&](int i) { return i0 + i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; });
  }
};

// Blocks of 8 table rows that share operands of q, and a wait for memory: as many as there are registers for.
template <typename Rows>
constexpr int kTableBlocks = Rows::kD <= (sizeof(typename Rows::Element) == 2 ? 96 : 80) ? 4 : 2;

// put(half, row, i, factor) for every factor of a strip of 16 queries, `first` and on, and these keys that this lane
// holds: row is lane / 4 + 8 half of the strip, i the number of the key among these.
template <int BLOCKS, typename Rows, typename F>
__device__ __forceinline__ void strip_factors(const AttentionParams& p, int a, const KeyRange& keys,
                                              const Coordinates* rows, const Rows& q, int first, F&& put) {
  using T = typename Rows::Element;
  constexpr int D = Rows::kD;
  constexpr int kAtOnce = sizeof(T) == 2 ? D / 16 : 1;  // steps: in half precision all, and those of the queries stay
  const int row = threadIdx.x % 32 / 4;
  OperandA<T> queries[kAtOnce];
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) queries[i].template load_spread<kAtOnce>(q, first, 0, i);
  }
  const UsedRows used(p, a, keys, rows + first);
  for (int i0 = 0; i0 <= used.last; i0 += 8 * BLOCKS) {
    int key[BLOCKS * 4];
    used.find_keys(p.index, key, i0);
    float acc[BLOCKS][4] = {};
#pragma unroll(kStepsUnrolled<T, D>)
    for (int step = 0; step < steps_of<T, D>(p.shape.D); step += kAtOnce) {
      RowSteps<T, kAtOnce> table_rows[BLOCKS];
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) table_rows[n].load(used.row<T>(p, i0 + n * 8 + row), step * 16, p.shape.D);
      if constexpr (sizeof(T) == 4) queries[0].template load_spread<1>(q, first, step * 16, 0);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n) {
          OperandB<T> columns;
          columns.set_row(table_rows[n].of_step[i]);
          multiply(acc[n], queries[i], columns);
        }
    }
#pragma unroll
    for (int i = 0; i < BLOCKS * 4; ++i)
      if (is_between(key[i], keys.begin, keys.end))
        put(i % 4 / 2, row + i % 4 / 2 * 8, key[i] - keys.begin, acc[i / 4][i % 4]);
  }
}

// The largest of each of this lane's two queries over all keys of an axis; 0 if it has no bias.
template <typename Rows>
__device__ __forceinline__ void largest_factors(const AttentionParams& p, int a, const Coordinates* rows, const Rows& q,
                                                int first, float (&largest)[2]) {
  float most[2] = {-INFINITY, -INFINITY};
  strip_factors<kTableBlocks<Rows>>(p, a, {0, p.shape.axis[a].keys}, rows, q, first,
                                    [&](int half, int, int, float x) { most[half] = fmaxf(most[half], x); });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int x = 1; x < 4; x *= 2) most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], x));
    largest[half] = rows[first + threadIdx.x % 32 / 4 + half * 8].of[a] < 0 ? 0.f : most[half];
  }
}

// put(line, x) for every line of keys, by the two lanes (l and l + 16) of each query of a strip: x is what the line
// adds, in powers of two. Returns the largest x there may be; with RELATIVE, x is below it. `stage`: the warp's own.
template <bool RELATIVE, int BLOCKS, typename Rows, typename F>
__device__ __forceinline__ float strip_lines(const AttentionParams& p, const Coordinates* rows, const Rows& q,
                                             int first, float* stage, F&& put) {
  const Shape& s = p.shape;
  const int row = threadIdx.x % 16, part = threadIdx.x % 32 / 16;
  float largest = 0.f;
#pragma unroll 1
  for (int a = kT; a < kW; ++a) {
    const Axis& axis = s.axis[a];
    float* of_axis = stage + (a == kH ? s.axis[kT].factors() * 16 : 0);
    if (axis.rows == 0) continue;
    strip_factors<BLOCKS>(p, a, {0, axis.keys}, rows, q, first,
                          [&](int, int to, int key, float x) { of_axis[key * 16 + to] = x; });
    __syncwarp();
    if constexpr (RELATIVE) {
      float most = -INFINITY;
      const bool biased = rows[first + row].of[a] >= 0;
      for (int i = part; biased && i < axis.keys; i += 2) most = fmaxf(most, of_axis[i * 16 + row]);
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
      largest += biased ? most * kLog2e : 0.f;
    }
  }
  const float *of_t = stage + row, *of_h = of_t + s.axis[kT].factors() * 16;
  const bool biased = rows[first + row].of[kH] >= 0;
  const int keys_h = s.axis[kH].keys;
#pragma unroll 1
  for (int t = 0; t < s.axis[kT].keys; ++t) {
    const float rest = (s.axis[kT].rows ? of_t[t * 16] * kLog2e : 0.f) - largest;
#pragma unroll 4
    for (int h = part; h < keys_h; h += 2) put(t * keys_h + h, biased ? fmaf(of_h[h * 16], kLog2e, rest) : 0.f);
  }
  return largest;
}

// Of all queries of a block: [lines, block rows], in powers of two, below that of their largest.
template <typename T>
struct LineFactors {
  Factor<T>* data;
  int ld;
  float* largest;  // [block rows]

  __device__ __forceinline__ Factor<T>& at(int line, int row) const { return data[line * ld + row]; }

  // By the warp of that strip; `stage`: its own.
  template <typename Rows>
  __device__ __forceinline__ void fill(const AttentionParams& p, const Coordinates* rows, const Rows& q, int first,
                                       float* stage) const {
    const int row = first + threadIdx.x % 16, part = threadIdx.x % 32 / 16, padded = p.keys.padded_lines;
    const float sum = strip_lines<true, kTableBlocks<Rows>>(
        p, rows, q, first, stage, [&](int line, float x) { at(line, row) = from_float<Factor<T>>(x); });
    for (int line = p.shape.outer_keys() + part; line < padded + p.keys.lines; line += 2)
      at(line, row) = from_float<Factor<T>>(line < padded ? -INFINITY : 0.f);  // no lines; class tokens
    if (part == 0) largest[row] = sum;
    __syncwarp();  // they are there, and the stage may be overwritten
  }
};

// The bias of one strip of 16 queries and one span, as the scores of a tile lie in registers.
template <typename T, int BLOCKS, bool ONE_LINE>
struct StripBias {
  static constexpr int kLd = BLOCKS * 8 + kInnerPad;
  int first;                // query of the block
  float column[BLOCKS][4];  // divided by scale; -inf past the span

  __device__ __forceinline__ int row(int half) const { return first + threadIdx.x % 32 / 4 + half * 8; }

  // Factors less `below`, of each of the lane's two queries; class tokens get `of_class`. `stage`: the warp's own.
  template <typename Rows>
  __device__ __forceinline__ void fill_columns(const AttentionParams& p, const Span& span, const Coordinates* rows,
                                               const Rows& q, const float (&below)[2], const float (&of_class)[2],
                                               float* stage) {
    const int lane = threadIdx.x % 32, strip = static_cast<int>(afresh(first));
    if (span.of_lines) {
      const KeyRange keys{span.first, span.first + span.columns};
      strip_factors<kTableBlocks<Rows>>(p, kW, keys, rows, q, strip,
                                        [&](int, int row, int key, float x) { stage[row * kLd + key] = x; });
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = column_of(p.keys, span, j) + lane % 4 * 2 + e % 2;
        const int row = lane / 4 + e / 2 * 8;
        const bool biased = span.of_lines && rows[strip + row].of[kW] >= 0;
        const float none = span.of_lines ? 0.f : of_class[e / 2];
        column[j][e] = at >= span.columns ? -INFINITY
                       : biased           ? (stage[row * kLd + at] - below[e / 2]) * p.inverse_scale
                                          : none;
      }
    __syncwarp();  // before the next strip overwrites the stage
  }

  // Blocks `begin` .. of a tile: score is what the products with the keys start from, `line` what is to be added to
  // each block of them after, in powers of two.
  template <int PART>
  __device__ __forceinline__ void start(const AttentionParams& p, const LineFactors<T>& lines, const Span& span,
                                        int tile, int begin, float (&score)[PART][4], float (&line)[PART][2]) const {
    start_columns(begin, score);
    load_lines(p, lines, span, tile, begin, line);
  }
  template <int PART>
  __device__ __forceinline__ void start_columns(int begin, float (&score)[PART][4]) const {
#pragma unroll
    for (int j = 0; j < PART; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) score[j][e] = kWithBias ? column[begin + j][e] : 0.f;
  }
  template <int PART>
  __device__ __forceinline__ void load_lines(const AttentionParams& p, const LineFactors<T>& lines, const Span& span,
                                             int tile, int begin, float (&line)[PART][2]) const {
    const int first_line = span.line_factors + tile * p.keys.lines;
#pragma unroll
    for (int j = 0; j < PART; ++j) {
      const int of_block = first_line + (ONE_LINE ? 0 : p.keys.line_of[begin + j]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        line[j][half] = !kWithBias ? 0.f : ONE_LINE && j > 0 ? line[0][half] : to_float(lines.at(of_block, row(half)));
    }
  }
};

}  // namespace relpos
