// attention_fwd_window.cuh - the forward of attention_fwd.cuh where the keys of a group are few: all of them are in
// shared memory, and after they have come, warps no longer wait for each other.
//
//                keys: class tokens, then lines of 8 or 16 slots, a few of them per step --->
//               +--------+--------+ .. +
//   a strip of  |        |        |    |    scores start from the column factors, which are the same for every line,
//   16 queries  |        |        |    |    in registers; line factors: one number per query and line, shared memory
//               +--------+--------+ .. +
//
//   grid     (groups * ceil(M / block_rows)). A warp has a strip per pass; the factors of the first are found while
//            keys are on their way.
//   thread   as in attention_fwd.cuh.
//   shared   q, coordinates and factors of a pass, each warp its own; k and v as they lie in memory, and zeros behind:
//            slots past the end of a line are the first keys of the next, and do not count.
//   barriers two: where the block works is known; k and v have arrived.
#pragma once
#include "tile/softmax.cuh"

namespace relpos {

template <typename T, int D, int LINE_BLOCKS>
struct AttentionFwdWindow {
  static constexpr int kBlocks = kWindowBlocks, kPairLines = 2 / LINE_BLOCKS;  // of 8 keys per step; lines of two
  using Pair = float (&)[1][2][4];
  using Bias = StripBias<T, LINE_BLOCKS, false>;
  using Softmax = OnlineSoftmax<T, D, 1, kBlocks, false>;
  using At = AttentionFwdWindowShared;
  using Queries = StripRows<Tile<T, D>, D <= 80>;  // as many as there are registers for
  const AttentionFwdParams& p;
  unsigned char* shared;
  int first;  // of the queries of a pass: the warp's own

  // afresh: where things are is not kept while others are found.
  template <typename U>
  __device__ __forceinline__ U* at(int64_t offset) const {
    return reinterpret_cast<U*>(shared + afresh(offset));
  }
  __device__ __forceinline__ Tile<T, D> q() const { return {at<T>(p.at_window.q)}; }
  __device__ __forceinline__ Tile<T, D> k() const { return {at<T>(p.at_window.k)}; }
  __device__ __forceinline__ Tile<T, D> v() const { return {at<T>(p.at_window.v)}; }
  __device__ __forceinline__ LineFactors<T> lines() const {
    return {at<Factor<T>>(p.at_window.lines), p.at_window.pass_rows, at<float>(p.at_window.largest)};
  }
  __device__ __forceinline__ Coordinates* rows() const { return reinterpret_cast<Coordinates*>(shared + At::rows); }
  __device__ __forceinline__ float* stage() const { return at<float>(p.at_window.staged) + first * p.keys.staged; }

  // Starts copies of the strip.
  __device__ __forceinline__ void copy_queries(const BlockPlace& place) const {
    copy_strip(q(), static_cast<int>(afresh(first)), p, place, p.q);
    cp_async_commit();
  }

  // What the products of a step start from, and what is to be added to each block of them after.
  __device__ __forceinline__ void start_lines(const Bias& bias, const LineFactors<T>& lines, int first_line,
                                              float (&score)[kBlocks][4], float (&line)[kBlocks][2]) const {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        line[j][half] = kWithBias ? to_float(lines.at(first_line + j / LINE_BLOCKS, bias.row(half))) : 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) score[j][e] = kWithBias ? bias.column[j % LINE_BLOCKS][e] : 0.f;
    }
  }
  __device__ __forceinline__ void start_class_tokens(const Bias& bias, const LineFactors<T>& lines, int left,
                                                     float (&score)[kBlocks][4], float (&line)[kBlocks][2]) const {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      line[j][0] = line[j][1] = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        score[j][e] =
            j * 8 + threadIdx.x % 4 * 2 + e % 2 < left ? -lines.largest[bias.row(e / 2)] * p.from_powers : -INFINITY;
    }
  }

  // A step, whose pairs of blocks are `pair` rows apart, and the blocks of a pair `next`.
  __device__ __forceinline__ void absorb(Softmax& mine, const Queries& queries, float (&score)[1][kBlocks][4],
                                         const float (&line)[1][kBlocks][2], const Tile<T, D>& k, const Tile<T, D>& v,
                                         int row, int pair, int next) const {
#pragma unroll
    for (int i = 0; i < kBlocks / 2; ++i)
      add_products(reinterpret_cast<Pair>(score[0][2 * i]), queries, k, row + i * pair, p.shape.D, next);
    mine.weigh(p, score, line);
#pragma unroll
    for (int i = 0; i < kBlocks / 2; ++i)
      add_weighted(mine.out, reinterpret_cast<Pair>(score[0][2 * i]), v, row + i * pair, p.shape.D, next);
  }

  // The strip of a pass, whose keys are there.
  __device__ __forceinline__ void attend(const BlockPlace& place, const Bias& bias) const {
    const int keys_w = p.shape.axis[kW].keys, pair = keys_w * kPairLines, next = LINE_BLOCKS == 2 ? 8 : keys_w;
    float score[1][kBlocks][4], line[1][kBlocks][2];
    const Tile<T, D> k = this->k(), v = this->v();
    const LineFactors<T> lines = this->lines();
    Softmax mine;
    Queries queries(q(), first);
    queries.hold(q());
    int row = 0;
#pragma unroll 1
    for (; row < p.shape.prefix; row += kBlocks * 8) {
      start_class_tokens(bias, lines, p.shape.prefix - row, score[0], line[0]);
      absorb(mine, queries, score, line, k, v, row, 16, 8);
    }
    row = p.shape.prefix;
#pragma unroll 1
    for (int i = 0; i < p.keys.padded_lines; i += kBlocks / LINE_BLOCKS, row += kBlocks / 2 * pair) {
      start_lines(bias, lines, i, score[0], line[0]);
      absorb(mine, queries, score, line, k, v, row, pair, next);
    }
    mine.store(p, place, 0, static_cast<int>(afresh(first)), lines.largest, q());
  }
};

template <typename T, int D, int LINE_BLOCKS>
__global__ void __launch_bounds__(kMostFwdWindowThreads, 1) attention_fwd_window_kernel(const AttentionFwdParams p) {
  constexpr float kNothing[2] = {};
  RELPOS_DYNAMIC_SHARED(shared);
  const AttentionFwdWindow<T, D, LINE_BLOCKS> work{p, shared, static_cast<int>(threadIdx.x) / 32 * 16};
  BlockPlace* passes = reinterpret_cast<BlockPlace*>(shared);
  if (threadIdx.x < kFwdWindowPasses) {
    BlockPlace& pass = passes[threadIdx.x];
    find_place(p, static_cast<int>(p.shape.M()), pass);
    const int before = threadIdx.x * p.at_window.pass_rows;
    pass.first += before;
    pass.count = min(p.at_window.pass_rows, pass.count - before);
  }
  __syncthreads();
  work.copy_queries(passes[0]);
  const int tokens = static_cast<int>(p.shape.N());
  copy_tokens(work.k(), p.at_window.key_rows, p, passes[0], p.k, 0, tokens);
  copy_tokens(work.v(), p.at_window.key_rows, p, passes[0], p.v, 0, tokens);
  cp_async_commit();
#pragma unroll 1
  for (int i = 0; i < kFwdWindowPasses; ++i) {
    const BlockPlace& place = passes[i];
    if (i > 0) {
      if (work.first >= place.count) break;
      work.copy_queries(place);
    }
    if (threadIdx.x % 32 < 16)
      work.rows()[work.first + threadIdx.x % 32] = locate_query(p, place, work.first + threadIdx.x % 32);
    if (i > 0)
      cp_async_wait<0>();
    else
      cp_async_wait<1>();
    __syncwarp();
    typename decltype(work)::Bias bias;
    bias.first = work.first;
    work.lines().fill(p, work.rows(), work.q(), static_cast<int>(afresh(work.first)), work.stage());
    bias.fill_columns(p, span_of(p, 0), work.rows(), work.q(), kNothing, kNothing, work.stage());
    if (i == 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    // The next strip may overwrite this one: all is read before the results are put together, and where those lie in
    // the tile of q, the thread that copies there has stored them.
    if (work.first < place.count) work.attend(place, bias);
  }
}

}  // namespace relpos
