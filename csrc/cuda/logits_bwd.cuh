// logits_bwd.cuh - gradients of q and of the factors; the gradient of the logits passes through, it is only read.
//
//   d_rel_h[m, i] = sum over keys n in image row i of grad[m, n]        d_rel_w[m, j] = ... in column j
//   dq[m]         = sum over axes a, keys i of d_rel_a[m, i] * R_a[c(m), i]
//
//                N keys of a row --->
//              +-----------------------+
//   a warp per | x x x x | x x x x | ..|    d_rel_h: sum of a box,   d_rel_w: sum of a column of the boxes
//   row m      +-----------------------+
//
//   grid     (ceil(rows / block_rows)).
//   thread   a lane of the warp that sums every 8th row of the tile; then four elements of dq at a time.
//   shared   rows [block_rows], factors [block_rows, factor_ld] float, a buffer per warp.
//   barriers rows are located; sums are complete. Every sum has a fixed order.
#pragma once
#include "tile/copy.cuh"
#include "tile/rows.cuh"

namespace relpos {

struct SumRow {
  const Shape& shape;
  float* outer;    // [outer keys]
  float* inner;    // [keys of w]
  float* buffer;   // of this warp: kSumBuffer + kSumPadding floats
  int64_t end;     // elements of the whole gradient
};

// Where image rows of keys are whole vectors and a warp loads whole image rows at once, a lane meets the same columns
// in every vector: column sums stay in its registers.
template <typename S>
__device__ __forceinline__ void sum_row_in_registers(const SumRow& to, const S* grad) {
  constexpr int V = kVector<S>, kUnroll = 4;
  const int lane = threadIdx.x % 32;
  const int keys_o = to.shape.outer_keys(), lanes = to.shape.axis[kW].keys / V, at_once = 32 / lanes;
  float column[V] = {};
  for (int o0 = 0; o0 < keys_o; o0 += kUnroll * at_once) {
    uint4 regs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int o = o0 + u * at_once + lane / lanes;
      regs[u] = o < keys_o ? load_stream(grad + (static_cast<int64_t>(o) * lanes + lane % lanes) * V)
                           : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int o = o0 + u * at_once + lane / lanes;
      float x[V], sum = 0.f;
      unpack<S>(regs[u], x);
#pragma unroll
      for (int i = 0; i < V; ++i) column[i] += x[i], sum += x[i];
      for (int d = lanes / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane % lanes == 0 && o < keys_o) to.outer[o] = sum;
    }
  }
  for (int d = lanes; d < 32; d *= 2)
#pragma unroll
    for (int i = 0; i < V; ++i) column[i] += __shfl_xor_sync(~0u, column[i], d);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (lane < lanes) to.inner[lane * V + i] = column[i];
}

// grad[begin, begin + n) as float, n <= kSumBuffer, by whole aligned vectors wherever they lie inside the gradient.
template <typename S>
__device__ __forceinline__ const float* fill_buffer(const SumRow& to, const S* grad, int64_t begin, int n) {
  constexpr int V = kVector<S>;
  const int shift = static_cast<int>(begin % V);
  const int64_t aligned = begin - shift;
  for (int v = threadIdx.x % 32; v * V < shift + n; v += 32) {
    const int64_t at = aligned + v * V;
    float x[V];
    if (at + V <= to.end) {
      unpack<S>(load_stream(grad + at), x);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = at + i < to.end ? to_float(grad[at + i]) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) to.buffer[v * V + i] = x[i];
  }
  return to.buffer + shift;
}

// The sum of each of `lines` image rows of the buffer, `width` keys each, goes to outer[0 .. lines).
__device__ __forceinline__ void sum_lines(const float* x, int lines, int width, bool first, float* outer) {
  const int lane = threadIdx.x % 32;
  if (width <= 32) {
    for (int r = lane; r < lines; r += 32) {
      float sum = 0.f;
      for (int j = 0; j < width; ++j) sum += x[r * width + j];
      outer[r] = sum;
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
      const int lines = min(lines_at_once, keys_o - o0);
      const float* x = fill_buffer(to, grad, begin + static_cast<int64_t>(o0) * keys_w + j0, lines * width);
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

// Factor gradients of one row, by one warp.
template <typename S>
__device__ __forceinline__ void sum_row(const LogitsBwdParams& p, int64_t row, float* factors, float* buffer) {
  const Shape& s = p.shape;
  const int lane = threadIdx.x % 32, keys_h = s.axis[kH].keys;
  const bool with_t = s.axis[kT].rows != 0;
  float* outer = with_t ? buffer + kSumBuffer + kSumPadding : factors + s.axis[kH].factor;
  const SumRow to{s, outer, factors + s.axis[kW].factor, buffer, s.rows() * s.N()};
  const S* grad = static_cast<const S*>(p.grad);
  const int64_t begin = row * s.N() + s.prefix;
  if (p.lanes_own_columns) sum_row_in_registers(to, grad + begin);
  else sum_row_in_buffer(to, grad, begin);
  if (!with_t) return;
  __syncwarp();
  for (int h = lane; h < keys_h; h += 32) {
    float sum = 0.f;
    for (int o = h; o < s.outer_keys(); o += keys_h) sum += outer[o];
    factors[s.axis[kH].factor + h] = sum;
  }
  for (int t = lane; t < s.axis[kT].keys; t += 32) {
    float sum = 0.f;
    for (int h = 0; h < keys_h; ++h) sum += outer[t * keys_h + h];
    factors[s.axis[kT].factor + t] = sum;
  }
  __syncwarp();
}

template <typename T>
__device__ __forceinline__ void query_gradient(const LogitsBwdParams& p, const RowOfTile* rows, const float* factors,
                                               int64_t first_row, int count) {
  const int D = p.shape.D, quads = ceil_div(D, 4);
  const T* table = static_cast<const T*>(p.table);
  for (int item = threadIdx.x; item < count * quads; item += kThreads) {
    int d;
    const int row = p.by_lanes_d.divide(item, d);
    d *= 4;
    float sum[4] = {};
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = p.shape.axis[a];
      const int c = rows[row].coordinate[a];
      if (axis.rows == 0 || c < 0) continue;
      const int32_t* of_query = p.index + axis.index + c * axis.keys;
      const float* weights = factors + row * p.factor_ld + axis.factor;
#pragma unroll 4
      for (int i = 0; i < axis.keys; ++i) {
        float t[4];
        load4(table + static_cast<int64_t>(of_query[i]) * D + d, D - d, D % 4 == 0, t);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += weights[i] * t[e];
      }
    }
    T* dq = static_cast<T*>(p.dq) + (first_row + row) * D + d;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (d + e < D) dq[e] = from_float<T>(sum[e]);
  }
}

// S: gradient of the logits; T: q, dq and table.
template <typename S, typename T>
__global__ void __launch_bounds__(kThreads, 2) logits_bwd_kernel(const LogitsBwdParams p) {
  RELPOS_DYNAMIC_SHARED(shared);
  const LogitsShared at = logits_shared(Direction::kBackward, p.shape, p.block_rows, p.factor_ld, 0, 0);
  RowOfTile* rows = reinterpret_cast<RowOfTile*>(shared + at.rows);
  float* factors = reinterpret_cast<float*>(shared + at.factors);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = p.shape.factors();
  const int outer = p.shape.axis[kT].rows ? round_up(p.shape.outer_keys(), 4) : 0;
  float* buffer = reinterpret_cast<float*>(shared + at.buffers) + warp * (kSumBuffer + kSumPadding + outer);

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * p.block_rows;
  const int64_t left = p.shape.rows() - first_row;
  const int count = left < p.block_rows ? static_cast<int>(left) : p.block_rows;
  locate_rows(p.shape, p.q, first_row, count, rows);
  __syncthreads();

  for (int row = warp; row < count; row += kWarps) {
    float* of_row = factors + row * p.factor_ld;
    if (rows[row].coordinate[kW] < 0) {  // a class token
      for (int i = lane; i < width; i += 32) of_row[i] = 0.f;
    } else {
      sum_row<S>(p, first_row + row, of_row, buffer);
    }
  }
  __syncthreads();

  if (p.dfactors)
    for (int row = warp; row < count; row += kWarps)
      for (int i = lane; i < width; i += 32) p.dfactors[(first_row + row) * width + i] = factors[row * p.factor_ld + i];
  if (p.dq) query_gradient<T>(p, rows, factors, first_row, count);
}

}  // namespace relpos
