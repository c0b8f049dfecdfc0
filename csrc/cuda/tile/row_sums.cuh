// row_sums.cuh - the factor gradients of a row of the logits: sums over its image rows of keys, and over their columns.
//
//                N keys of a row --->
//              +-----------------------+
//   a warp per | x x x x | x x x x | ..|    d_rel_h: sum of a box,   d_rel_w: sum of a column of the boxes
//   row m      +-----------------------+
#pragma once
#include "rows.cuh"

namespace relpos {

struct SumRow {
  const Shape& shape;
  float* outer;   // [outer keys]
  float* inner;   // [keys of w]
  float* buffer;  // of this warp: kSumBuffer + kSumPadding floats
  int64_t end;    // of the gradient that may be read by whole vectors
};

// Of 2 HALF sums that two lanes have parts of, `distance` apart, each completes half: the upper lane the upper ones.
template <int HALF, int COUNT>
__device__ __forceinline__ void share_sums(float (&sums)[COUNT], int distance) {
  const bool upper = threadIdx.x & distance;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const float given = upper ? sums[i] : sums[i + HALF];
    sums[i] = (upper ? sums[i + HALF] : sums[i]) + __shfl_xor_sync(~0u, given, distance);
  }
}

// Where image rows of keys are whole vectors and a warp loads whole image rows at once, a lane meets the same columns
// in every vector: column sums stay in its registers. SHARED: four lanes or more have an image row; then of four rows
// each lane completes one sum, with fewer shuffles than for four sums.
template <typename S, bool SHARED>
__device__ __forceinline__ void sum_row_in_registers(const SumRow& to, const S* grad, int lanes_log2) {
  constexpr int V = kVector<S>, kUnroll = 4;
  const int lane = threadIdx.x % 32, lanes = 1 << lanes_log2, at_once = 32 >> lanes_log2;
  const int keys_o = to.shape.outer_keys(), line = lane >> lanes_log2, own = lane & (lanes - 1);
  const int mine = SHARED ? line + (own >> (lanes_log2 - 2)) * at_once : line;
  const bool first = SHARED ? (own & (lanes / kUnroll - 1)) == 0 : own == 0;  // of the lanes that have the same sum
  float column[V] = {};
  grad += lane * V;
  for (int o0 = 0; o0 < keys_o; o0 += kUnroll * at_once, grad += kUnroll * 32 * V) {
    uint4 regs[kUnroll];
    float sums[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      regs[u] = o0 + u * at_once + line < keys_o ? load_stream(grad + u * 32 * V) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[V];
      unpack<S>(regs[u], x);
      column[0] += x[0], sums[u] = x[0];
#pragma unroll
      for (int i = 1; i < V; ++i) column[i] += x[i], sums[u] += x[i];
    }
    if constexpr (SHARED) {
      share_sums<2>(sums, lanes / 2);
      share_sums<1>(sums, lanes / 4);
      for (int d = lanes / 8; d; d /= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], d);
      if (first && o0 + mine < keys_o) to.outer[o0 + mine] = sums[0];
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (lanes == 2) sums[u] += __shfl_xor_sync(~0u, sums[u], 1);
        if (first && o0 + u * at_once + mine < keys_o) to.outer[o0 + u * at_once + mine] = sums[u];
      }
    }
  }
  for (int d = lanes; d < 32; d *= 2)
#pragma unroll
    for (int i = 0; i < V; ++i) column[i] += __shfl_xor_sync(~0u, column[i], d);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (lane < lanes) to.inner[lane * V + i] = column[i];
}

// 16 bytes of the gradient from `at` on, or, past the `readable` ones, element by element what is before `end`.
template <typename S>
__device__ __forceinline__ uint4 load_vector(const S* grad, int64_t at, int64_t end, int64_t readable) {
  constexpr int V = kVector<S>;
  if (at + V <= readable) return load_stream(grad + at);
  float x[V];
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = at + i < end ? to_float(grad[at + i]) : 0.f;
  return pack<S>(x);
}

template <typename S>
__device__ __forceinline__ void put_vector(float* to, uint4 vector) {
  float x[kVector<S>];
  unpack<S>(vector, x);
#pragma unroll
  for (int i = 0; i < kVector<S>; i += 4) *reinterpret_cast<float4*>(to + i) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
}

// Rows of few keys: a warp holds the next one in registers while it sums this one.
constexpr int kSmallSide = 16, kSmallRow = 256;

template <typename S>
__device__ __forceinline__ bool is_small(const Shape& s) {
  const int keys_o = s.outer_keys(), keys_w = s.axis[kW].keys;
  return s.axis[kT].rows == 0 && keys_o <= kSmallSide && keys_w <= kSmallSide &&
         keys_o * keys_w + kVector<S> - 1 <= kSmallRow;
}

template <typename S>
struct SmallRow {
  static constexpr int V = kVector<S>, kVectors = kSmallRow / (32 * V);
  uint4 vectors[kVectors] = {};
  int shift;

  __device__ __forceinline__ void load(const S* grad, int64_t begin, int n, int64_t readable) {
    shift = static_cast<int>(begin % V);
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int e = (u * 32 + threadIdx.x % 32) * V;
      if (e < shift + n) vectors[u] = load_vector(grad, begin - shift + e, begin + n, readable);
    }
  }
  __device__ __forceinline__ const float* put(float* buffer) const {  // what is past the row is not read
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int e = (u * 32 + threadIdx.x % 32) * V;
      put_vector<S>(buffer + e, vectors[u]);
    }
    return buffer + shift;
  }
};

// Half a warp sums the columns, the other half the image rows.
__device__ __forceinline__ void sum_small_grid(const SumRow& to, const float* x) {
  const int keys_o = to.shape.outer_keys(), keys_w = to.shape.axis[kW].keys, i = threadIdx.x % kSmallSide;
  const bool column = threadIdx.x % 32 < kSmallSide;
  const int step = column ? keys_w : 1, count = column ? keys_o : keys_w;
  if (i >= (column ? keys_w : keys_o)) return;
  x += column ? i : i * keys_w;
  float sum = 0.f, terms[kSmallSide];
#pragma unroll
  for (int k = 0; k < kSmallSide; ++k) terms[k] = k < count ? x[k * step] : 0.f;
#pragma unroll
  for (int k = 0; k < kSmallSide; ++k) sum += terms[k];
  (column ? to.inner : to.outer)[i] = sum;
}

// grad[begin, begin + n) as float, n <= kSumBuffer, by whole aligned vectors wherever they lie inside the gradient.
template <typename S>
__device__ __forceinline__ const float* fill_buffer(const SumRow& to, const S* grad, int64_t begin, int n) {
  constexpr int V = kVector<S>;
  const int shift = static_cast<int>(begin % V);
  const int64_t aligned = begin - shift;
  for (int e = threadIdx.x % 32 * V; e < shift + n; e += 32 * V)
    put_vector<S>(to.buffer + e, load_vector(grad, aligned + e, begin + n, to.end));
  return to.buffer + shift;
}

// grad[begin, begin + n) is on its way to L2, n <= kSumBuffer.
template <typename S>
__device__ __forceinline__ void prefetch_part(const S* grad, int64_t begin, int n) {
  const int at = threadIdx.x % 32 * (128 / static_cast<int>(sizeof(S)));
  if (at < n) prefetch_l2(grad + begin + at);
}

// The sum of each of `lines` image rows of the buffer, `width` keys each, goes to outer[0 .. lines), or is added there
// if it is not the first part of a long row.
__device__ __forceinline__ void sum_lines(const float* x, int lines, int width, bool first, float* outer) {
  const int lane = threadIdx.x % 32;
  if (width <= 32) {
    for (int r = lane; r < lines; r += 32) {
      float sum = 0.f;
      for (int j = 0; j < width; ++j) sum += x[r * width + j];
      outer[r] = first ? sum : outer[r] + sum;
    }
    return;
  }
  for (int r = 0; r < lines; ++r) {
    float sum = 0.f;
    for (int j = lane; j < width; j += 32) sum += x[r * width + j];
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane == 0) outer[r] = first ? sum : outer[r] + sum;
  }
}

// Any other grid: a run of image rows, or a part of a long one, goes through the warp's buffer.
template <typename S>
__device__ __forceinline__ void sum_row_in_buffer(const SumRow& to, const S* grad, int64_t begin) {
  const int lane = threadIdx.x % 32;
  const int keys_o = to.shape.outer_keys(), keys_w = to.shape.axis[kW].keys;
  const int lines_at_once = max(1, kSumBuffer / keys_w);
  for (int j0 = 0; j0 < keys_w; j0 += kSumBuffer) {
    const int width = min(kSumBuffer, keys_w - j0);
    float column[kSumBuffer / 32] = {};
    for (int o0 = 0; o0 < keys_o; o0 += lines_at_once) {
      const int lines = min(lines_at_once, keys_o - o0), next = o0 + lines;
      const int64_t part = begin + static_cast<int64_t>(o0) * keys_w + j0;
      prefetch_part(grad, part + lines * keys_w, min(lines_at_once, keys_o - next) * width);
      const float* x = fill_buffer(to, grad, part, lines * width);
      __syncwarp();
#pragma unroll
      for (int c = 0; c < kSumBuffer / 32; ++c) {
        const int j = c * 32 + lane;
        if (c * 32 >= width) break;
        for (int r = 0; j < width && r < lines; ++r) column[c] += x[r * width + j];
      }
      sum_lines(x, lines, width, j0 == 0, to.outer + o0);
      __syncwarp();
    }
#pragma unroll
    for (int c = 0; c < kSumBuffer / 32; ++c)
      if (c * 32 + lane < width) to.inner[j0 + c * 32 + lane] = column[c];
  }
}

// Elements of the gradient that may be read by whole vectors.
__device__ __forceinline__ int64_t readable_of(const LogitsBwdParams& p) {
  return p.whole_vectors ? p.shape.rows() * p.shape.N() : 0;
}

// Where the sums of a row go; `factors` are those of the row.
__device__ __forceinline__ SumRow row_sums(const LogitsBwdParams& p, float* factors, float* buffer) {
  const Shape& s = p.shape;
  float* outer = s.axis[kT].rows ? buffer + kSumBuffer + kSumPadding : factors + s.axis[kH].factor;
  return {s, outer, factors + s.axis[kW].factor, buffer, readable_of(p)};
}

// Factor gradients of rows warp, warp + kWarps, .. of the tile.
template <typename S>
__device__ __forceinline__ void sum_small_rows(const LogitsBwdParams& p, int64_t first_row, int count, float* factors,
                                               float* buffer) {
  const Shape& s = p.shape;
  const int n = s.outer_keys() * s.axis[kW].keys;
  const S* grad = static_cast<const S*>(p.grad);
  SmallRow<S> next;
  const auto load = [&](int row) {
    if (row < count) next.load(grad, (first_row + row) * s.N() + s.prefix, n, readable_of(p));
  };
  load(threadIdx.x / 32);
  prefetch_rows<S>(p, p.grad, first_row, count);  // a warp has one row under way, and few bytes are a row
  for (int row = threadIdx.x / 32; row < count; row += kWarps) {
    const float* x = next.put(buffer);
    load(row + kWarps);
    __syncwarp();
    sum_small_grid(row_sums(p, factors + row * p.factor_ld, buffer), x);
    __syncwarp();  // before the next row overwrites the buffer
  }
}

// As above, sum(to, grad) for each of them: sums of the image rows and of the columns.
template <typename S, typename Sum>
__device__ __forceinline__ void sum_rows_by(const LogitsBwdParams& p, int64_t first_row, int count, float* factors,
                                            float* buffer, Sum&& sum_row) {
  const Shape& s = p.shape;
  const int lane = threadIdx.x % 32, keys_h = s.axis[kH].keys;
  for (int row = threadIdx.x / 32; row < count; row += kWarps) {
    float* of_row = factors + row * p.factor_ld;
    const SumRow to = row_sums(p, of_row, buffer);
    sum_row(to, (first_row + row) * s.N() + s.prefix);
    if (s.axis[kT].rows == 0) continue;
    const float* outer = to.outer;
    __syncwarp();
    for (int h = lane; h < keys_h; h += 32) {
      float sum = 0.f;
      for (int o = h; o < s.outer_keys(); o += keys_h) sum += outer[o];
      of_row[s.axis[kH].factor + h] = sum;
    }
    for (int t = lane; t < s.axis[kT].keys; t += 32) {
      float sum = 0.f;
      for (int h = 0; h < keys_h; ++h) sum += outer[t * keys_h + h];
      of_row[s.axis[kT].factor + t] = sum;
    }
    __syncwarp();  // before the next row overwrites `outer`
  }
}

// Factor gradients of a tile, a warp per row; those of a class token's row are not used. Each way has a loop of its
// own, with registers of its own.
template <typename S>
__device__ __forceinline__ void sum_rows(const LogitsBwdParams& p, int64_t first_row, int count, float* factors,
                                         float* buffer) {
  const S* grad = static_cast<const S*>(p.grad);
  if (p.line_lanes_log2 >= 2)
    sum_rows_by<S>(p, first_row, count, factors, buffer, [&](const SumRow& to, int64_t begin) {
      sum_row_in_registers<S, true>(to, grad + begin, p.line_lanes_log2);
    });
  else if (p.line_lanes_log2 >= 0)
    sum_rows_by<S>(p, first_row, count, factors, buffer, [&](const SumRow& to, int64_t begin) {
      sum_row_in_registers<S, false>(to, grad + begin, p.line_lanes_log2);
    });
  else if (is_small<S>(p.shape))
    sum_small_rows<S>(p, first_row, count, factors, buffer);
  else
    sum_rows_by<S>(p, first_row, count, factors, buffer,
                   [&](const SumRow& to, int64_t begin) { sum_row_in_buffer<S>(to, grad, begin); });
}

}  // namespace relpos
