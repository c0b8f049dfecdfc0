// logits_fwd.cuh - the bias added to the logits in one pass; neither the bias nor its factors reach memory.
//
//   out[m, n] = logits[m, n] + rel_t[m, t(n)] + rel_h[m, h(n)] + rel_w[m, w(n)]      rel_a[m, i] = <q[m], R_a[c(m), i]>
//
//                N keys of a row, 16 bytes per load --->
//              +----------------------------------------+
//   block_rows | row m0      h h h h i i i i j j j j    |    rel_h changes once per image row of keys,
//   of one     | row m0 + 1  w0 w1 w2 w3 w0 w1 w2 w3 .. |    rel_w with every key
//   block      +----------------------------------------+
//              one contiguous slab, streamed as a flat array: vectors may straddle image rows and rows;
//              it starts at a whole vector, or else (a view at an odd offset) is streamed by elements
//
//   grid     (ceil(rows / block_rows)): rows of all groups, one after another.
//   thread   its share of the factors, while the first logits are on their way to L2; then every 256th vector of the
//            slab, or every 32nd of a run of them, whose columns are always the same; kUnroll loads in flight.
//   shared   rows [block_rows], ranges [6], factors [block_rows, factor_ld] float, q [block_rows, q_ld].
//   barriers rows are located; ranges, q and zeros are there; factors are complete.
#pragma once
#include "tile/bias.cuh"

namespace relpos {

// rel_t + rel_h of one image row of keys.
__device__ __forceinline__ float outer_factor(const LogitsFwdParams& p, const float* factors, int o) {
  if (p.shape.axis[kT].rows == 0) return factors[p.shape.axis[kH].factor + o];
  int h;
  const int t = p.by_keys_h.divide(o, h);
  return factors[p.shape.axis[kT].factor + t] + factors[p.shape.axis[kH].factor + h];
}

// x[0 .. COUNT): elements of the slab from e on, which lie in one image row of keys, or in that and the next. No
// branch, for some lanes of a warp would take each.
template <int COUNT>
__device__ __forceinline__ void add_bias_of_two_lines(const LogitsFwdParams& p, const float* factors, int e,
                                                      float (&x)[COUNT]) {
  int n, j;
  const int row = p.by_n.divide(e, n), o = p.by_keys_w.divide(n, j), left = p.shape.axis[kW].keys - j;
  const bool next_row = left < COUNT && o + 1 == p.shape.outer_keys();
  const float* of_row = factors + row * p.factor_ld;
  const float* of_next = next_row ? of_row + p.factor_ld : of_row;
  const float outer = outer_factor(p, of_row, o), next_outer = outer_factor(p, of_next, next_row ? 0 : o + 1);
  const float* inner = of_row + p.shape.axis[kW].factor + j;
  const float* next_inner = of_next + p.shape.axis[kW].factor - left;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) x[i] += (i < left ? outer : next_outer) + (i < left ? inner : next_inner)[i];
}

// x[0 .. COUNT): elements of the slab from e on.
template <int COUNT>
__device__ __forceinline__ void add_bias(const LogitsFwdParams& p, const float* factors, int e, float (&x)[COUNT]) {
  const int N = static_cast<int>(p.shape.N()), keys_w = p.shape.axis[kW].keys, w = p.shape.axis[kW].factor;
  int n;
  int row = p.by_n.divide(e, n);
  n -= p.shape.prefix;
  int j = 0;
  int o = n < 0 ? 0 : p.by_keys_w.divide(n, j);
  const float* of_row = factors + row * p.factor_ld;
  if (n >= 0 && j + COUNT <= keys_w) {  // the common case: one image row of keys
    const float outer = outer_factor(p, of_row, o);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] += outer + of_row[w + j + i];
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (n >= 0) {
      x[i] += outer_factor(p, of_row, o) + of_row[w + j];
      if (++j == keys_w) j = 0, ++o;
    }
    if (++n == N - p.shape.prefix) n = -p.shape.prefix, j = o = 0, of_row = factors + ++row * p.factor_ld;
  }
}

template <typename S>
__device__ __forceinline__ void stream_slab(const LogitsFwdParams& p, const float* factors, int64_t first_row,
                                            int count) {
  constexpr int V = kVector<S>, kUnroll = 4;
  const int64_t start = first_row * p.shape.N();
  const S* logits = static_cast<const S*>(p.logits) + start;
  S* out = static_cast<S*>(p.out) + start;
  const int elements = count * static_cast<int>(p.shape.N()), vectors = p.whole_vectors ? elements / V : 0;
  for (int v0 = threadIdx.x; v0 < vectors; v0 += kUnroll * kThreads) {
    uint4 regs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (v0 + u * kThreads < vectors) regs[u] = load_stream(logits + static_cast<int64_t>(v0 + u * kThreads) * V);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = v0 + u * kThreads;
      if (v >= vectors) break;
      float x[V];
      unpack<S>(regs[u], x);
      if (p.in_two_lines)
        add_bias_of_two_lines(p, factors, v * V, x);
      else
        add_bias(p, factors, static_cast<int>(afresh(v)) * V, x);  // the rare case keeps nothing from step to step
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(v) * V) = pack<S>(x);
    }
  }
  for (int e = vectors * V + threadIdx.x; e < elements; e += kThreads) {
    float x[1] = {to_float(logits[e])};
    add_bias(p, factors, e, x);
    out[e] = from_float<S>(x[0]);
  }
}

// Where image rows of keys are whole vectors and a warp loads whole image rows at once, a lane meets the same columns
// in every vector of a row: their factors stay in its registers. Warps take runs of vectors in turn, so that what the
// block has under way is one piece of memory, of whatever rows.
template <typename S>
__device__ __forceinline__ void stream_runs(const LogitsFwdParams& p, const float* factors, int64_t first_row,
                                            int count) {
  constexpr int V = kVector<S>, kUnroll = kRunVectors / 32;
  const int lane = threadIdx.x % 32, vectors = p.shape.outer_keys() << p.line_lanes_log2;
  const int runs = count * static_cast<int>(p.by_runs.divisor), own = lane & ((1 << p.line_lanes_log2) - 1);
  const int64_t start = first_row * p.shape.N();
  const S* logits = static_cast<const S*>(p.logits) + start;
  S* out = static_cast<S*>(p.out) + start;
  for (int run = threadIdx.x / 32; run < runs; run += kWarps) {
    int v;
    const int row = p.by_runs.divide(run, v);
    v = v * kRunVectors + lane;
    const int at = (row * vectors + v) * V;
    const float* of_row = factors + row * p.factor_ld;
    uint4 regs[kUnroll];
    float inner[V], outer[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (v + u * 32 < vectors) regs[u] = load_stream(logits + at + u * 32 * V);
#pragma unroll
    for (int i = 0; i < V; ++i) inner[i] = of_row[p.shape.axis[kW].factor + own * V + i];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (v + u * 32 < vectors) outer[u] = outer_factor(p, of_row, (v + u * 32) >> p.line_lanes_log2);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (v + u * 32 >= vectors) break;
      float x[V];
      unpack<S>(regs[u], x);
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] += outer[u] + inner[i];
      *reinterpret_cast<uint4*>(out + at + u * 32 * V) = pack<S>(x);
    }
  }
}

// S: logits; T: q and table; MMA: factors on tensor cores.
template <typename S, typename T, bool MMA>
__global__ void __launch_bounds__(kThreads, MMA ? 4 : 3) logits_fwd_kernel(const LogitsFwdParams p) {
  RELPOS_DYNAMIC_SHARED(shared);
  const ForwardShared at = forward_shared(p.block_rows, p.factor_ld, p.q_ld, MMA);
  RowOfTile* rows = reinterpret_cast<RowOfTile*>(shared + at.rows);
  int* ranges = reinterpret_cast<int*>(shared + at.ranges);
  float* factors = reinterpret_cast<float*>(shared + at.factors);

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * p.block_rows;
  const int64_t left = p.shape.rows() - first_row;
  const int count = left < p.block_rows ? static_cast<int>(left) : p.block_rows;
  const FactorTile tile{rows, count, factors, p.factor_ld};
  locate_rows(p, first_row, count, rows);
  __syncthreads();

  find_ranges(p.shape, p.index, rows, count, ranges);
  if constexpr (MMA)
    stage_queries<T>(tile, p, reinterpret_cast<T*>(shared + at.q));
  else
    stage_queries<T>(tile, p, reinterpret_cast<float*>(shared + at.q));
  prefetch_rows<S>(p, p.logits, first_row, count);  // not before the queries, for which the block waits
  if (p.shape.prefix)                               // class tokens have no bias
    for (int i = threadIdx.x; i < count * p.factor_ld; i += kThreads) factors[i] = 0.f;
  __syncthreads();

  if constexpr (MMA)
    tile_factors_mma<T>(tile, p, ranges, reinterpret_cast<const T*>(shared + at.q));
  else
    tile_factors_simt<T>(tile, p, ranges, reinterpret_cast<const float*>(shared + at.q));
  __syncthreads();

  const int64_t row = afresh(blockIdx.x) * p.block_rows;  // found anew: factors leave no registers for it
  if (p.line_lanes_log2 >= 0)
    stream_runs<S>(p, factors, row, count);
  else
    stream_slab<S>(p, factors, row, count);
}

}  // namespace relpos
