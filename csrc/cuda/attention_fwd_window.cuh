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
//   shared   q, coordinates and factors of a pass, each warp its own; the table (tile/whole_tables.cuh) where it is
//            small; k and v as they lie in memory, and zeros behind: slots past the end of a line are the first keys of
//            the next, and do not count.
//   barriers three: where the block works is known; the table has arrived, and so have k and v.
#pragma once
#include "tile/softmax.cuh"
#include "tile/whole_tables.cuh"

namespace relpos {

// What lines add to the scores of a lane's two queries, in powers of two: where in shared memory, in floats.
struct FwdWindowLines {
  int next[2];  // of the next line
};

// WHOLE: the table is in shared memory, and there are no class tokens.
template <typename T, int D, int LINE_BLOCKS, bool WHOLE>
struct AttentionFwdWindow {
  static constexpr int kBlocks = kWindowBlocks, kPairLines = 2 / LINE_BLOCKS;  // of 8 keys per step; lines of two
  using Pair = float (&)[1][2][4];
  using Bias = StripBias<T, LINE_BLOCKS, false>;
  using Softmax = OnlineSoftmax<T, D, 1, kBlocks, false>;
  using At = AttentionFwdWindowShared;
  using Queries = StripRows<Tile<T, D>, D <= (WHOLE ? kMostHeldD : 64)>;  // as many as there are registers for
  const AttentionFwdParams& p;
  unsigned char* shared;
  int first;  // of the queries of a pass: the warp's own

  // afresh: where things are is not kept while others are found.
  template <typename U>
  __device__ __forceinline__ U* at(int64_t offset) const {
    return reinterpret_cast<U*>(shared + afresh(offset));
  }
  // Of a pass, whose number is that of the bytes before: a register less.
  __device__ __forceinline__ const BlockPlace& place(int pass) const { return *at<const BlockPlace>(pass); }
  __device__ __forceinline__ Tile<T, D> q() const { return {at<T>(p.at_window.q)}; }
  __device__ __forceinline__ Tile<T, D> k() const { return {at<T>(p.at_window.k)}; }
  __device__ __forceinline__ Tile<T, D> v() const { return {at<T>(p.at_window.v)}; }
  __device__ __forceinline__ Tile<T, D> table() const { return {at<T>(p.at_window.table)}; }
  __device__ __forceinline__ Coordinates* rows() const { return reinterpret_cast<Coordinates*>(shared + At::rows); }
  __device__ __forceinline__ float* stage() const { return at<float>(p.at_window.stage) + first * p.at_window.staged; }

  // Starts copies of the strip.
  __device__ __forceinline__ void copy_queries(const BlockPlace& place) const {
    copy_strip(q(), static_cast<int>(afresh(first)), p, place, p.q);
    cp_async_commit();
  }

  // The strip's factors: of columns to `bias`, of lines to the stage.
  __device__ __forceinline__ FwdWindowLines find_factors(Bias& bias, Queries& queries) const {
    if constexpr (WHOLE)
      return find_whole_factors(bias, queries);
    else
      return find_any_factors(bias, queries);
  }
  __device__ __forceinline__ FwdWindowLines find_any_factors(Bias& bias, Queries& queries) const {
    constexpr float kNothing[2] = {};
    const int row = threadIdx.x % 16;
    const Axis &t = p.shape.axis[kT], &h = p.shape.axis[kH];
    bias.fill_columns(p, span_of(p, 0), rows(), q(), kNothing, kNothing, stage());
    float* lines = stage() + (t.rows ? t.keys + h.keys : 0) * 16;  // else where the factors of that axis are
    strip_lines<false, 2>(p, rows(), q(), static_cast<int>(afresh(first)), stage(),
                          [&](int line, float x) { lines[line * 16 + row] = x; });
    __syncwarp();
    queries.hold(q());
    const int of_row = place_of(lines) + static_cast<int>(threadIdx.x % 32 / 4);
    return {{of_row, of_row + 8}};
  }
  __device__ __forceinline__ FwdWindowLines find_whole_factors(Bias& bias, Queries& queries) const {
    const int row = threadIdx.x % 32 / 4, keys_w = p.shape.axis[kW].keys;
    const Coordinates* rows = this->rows() + first;
    queries.hold(q());
    __syncwarp();  // the stage may be where they were
    put_products(p, kW, queries, table(), p.inverse_scale, stage());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* of_key = stage() + place_of_first_key(p, kW, rows, row + half * 8);
#pragma unroll
      for (int j = 0; j < LINE_BLOCKS; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = j * 8 + threadIdx.x % 4 * 2 + e;
          bias.column[j][2 * half + e] = key < keys_w ? of_key[-(key << p.shape.axis[kW].k_shift)] : -INFINITY;
        }
    }
    __syncwarp();  // they may be overwritten
    put_products(p, kH, queries, table(), kLog2e, stage());
    const auto of_row = [&](int half) { return place_of(stage() + place_of_first_key(p, kH, rows, row + half * 8)); };
    return {{of_row(0), of_row(1)}};
  }
  __device__ __forceinline__ int place_of(const float* x) const {
    return static_cast<int>(x - reinterpret_cast<const float*>(shared));
  }

  // What the products of a step start from, and what is to be added to each block of them after; `left` lines exist.
  __device__ __forceinline__ void start_lines(const Bias& bias, FwdWindowLines& lines, int left,
                                              float (&score)[kBlocks][4], float (&line)[kBlocks][2]) const {
    const float* factors = reinterpret_cast<const float*>(shared);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        line[j][half] = kWithBias ? factors[lines.next[half] + j / LINE_BLOCKS * p.at_window.line_step] : 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) score[j][e] = kWithBias ? bias.column[j % LINE_BLOCKS][e] : 0.f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) lines.next[half] += kBlocks / LINE_BLOCKS * p.at_window.line_step;
    if (left < kBlocks / LINE_BLOCKS)
#pragma unroll
      for (int j = LINE_BLOCKS; j < kBlocks; ++j)
        if (j / LINE_BLOCKS >= left) line[j][0] = line[j][1] = -INFINITY;
  }
  __device__ __forceinline__ void start_class_tokens(int left, float (&score)[kBlocks][4],
                                                     float (&line)[kBlocks][2]) const {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      line[j][0] = line[j][1] = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) score[j][e] = j * 8 + threadIdx.x % 4 * 2 + e % 2 < left ? 0.f : -INFINITY;
    }
  }

  // A step, whose pairs of blocks are `pair` rows apart, and the blocks of a pair `next`.
  __device__ __forceinline__ void absorb(Softmax& mine, const Queries& queries, float (&score)[1][kBlocks][4],
                                         const float (&line)[1][kBlocks][2], const Tile<T, D>& k, const Tile<T, D>& v,
                                         int pair, int next) const {
#pragma unroll
    for (int i = 0; i < kBlocks / 2; ++i)
      add_products(reinterpret_cast<Pair>(score[0][2 * i]), queries, k, i * pair, p.shape.D, next);
    mine.weigh(p, score, line);
#pragma unroll
    for (int i = 0; i < kBlocks / 2; ++i)
      add_weighted(mine.out, reinterpret_cast<Pair>(score[0][2 * i]), v, i * pair, p.shape.D, next);
  }

  // The strip of a pass, whose keys are there.
  __device__ __forceinline__ void attend(int pass, const Bias& bias, FwdWindowLines lines,
                                         const Queries& queries) const {
    const int keys_w = p.shape.axis[kW].keys, pair = keys_w * kPairLines, next = LINE_BLOCKS == 2 ? 8 : keys_w;
    float score[1][kBlocks][4], line[1][kBlocks][2];
    Tile<T, D> k = this->k(), v = this->v();
    const auto advance = [&](int rows) { k.data += rows * k.kLd, v.data += rows * v.kLd; };
    Softmax mine;
    if constexpr (!WHOLE) {
#pragma unroll 1
      for (int left = p.shape.prefix; left > 0; left -= kBlocks * 8) {
        start_class_tokens(left, score[0], line[0]);
        absorb(mine, queries, score, line, k, v, 16, 8);
        advance(min(left, kBlocks * 8));
      }
    }
#pragma unroll 1
    for (int left = p.shape.outer_keys(); left > 0; left -= kBlocks / LINE_BLOCKS) {
      start_lines(bias, lines, left, score[0], line[0]);
      absorb(mine, queries, score, line, k, v, pair, next);
      advance(kBlocks / 2 * pair);
    }
    __syncwarp();  // line factors are where results come now
    mine.store(p, place(pass), 0, static_cast<int>(afresh(first)), q(), [](int) { return 0.f; });
  }
};

template <typename T, int D, int LINE_BLOCKS, bool WHOLE>
__global__ void __launch_bounds__(kMostFwdWindowThreads, 1) attention_fwd_window_kernel(const AttentionFwdParams p) {
  using Work = AttentionFwdWindow<T, D, LINE_BLOCKS, WHOLE>;
  RELPOS_DYNAMIC_SHARED(shared);
  const Work work{p, shared, static_cast<int>(threadIdx.x) / 32 * 16};
  BlockPlace* passes = reinterpret_cast<BlockPlace*>(shared);
  if (threadIdx.x < kFwdWindowPasses) {
    BlockPlace& pass = passes[threadIdx.x];
    find_place(p, static_cast<int>(p.shape.M()), pass);
    const int before = threadIdx.x * p.at_window.pass_rows;
    pass.first += before;
    pass.count = min(p.at_window.pass_rows, pass.count - before);
  }
  __syncthreads();
  if constexpr (WHOLE) copy_table(work.table(), p.at_window.table_rows, p);
  work.copy_queries(passes[0]);
  const int tokens = static_cast<int>(p.shape.N());
  copy_tokens(work.k(), p.at_window.key_rows, p, passes[0], p.k, 0, tokens);
  copy_tokens(work.v(), p.at_window.key_rows, p, passes[0], p.v, 0, tokens);
  cp_async_commit();
  constexpr int kPlace = sizeof(BlockPlace);
#pragma unroll 1
  for (int pass = 0; pass < kFwdWindowPasses * kPlace; pass += kPlace) {
    if (pass > 0) {
      if (work.first >= work.place(pass).count) break;
      work.copy_queries(work.place(pass));
    }
    if (threadIdx.x % 32 < 16)
      work.rows()[work.first + threadIdx.x % 32] = locate_query(p, work.place(pass), work.first + threadIdx.x % 32);
    if (pass > 0) {
      cp_async_wait<0>();
      __syncwarp();
    } else {
      cp_async_wait<1>();
      __syncthreads();
    }
    typename Work::Bias bias;
    bias.first = work.first;
    typename Work::Queries queries(work.q(), work.first);
    const FwdWindowLines lines = work.find_factors(bias, queries);
    if (pass == 0) {
      cp_async_wait<0>();
      __syncthreads();
    }
    // The next strip may overwrite this one: all is read before the results are put together, and where those lie in
    // the tile of q, the thread that copies there has stored them.
    if (work.first < work.place(pass).count) work.attend(pass, bias, lines, queries);
  }
}

}  // namespace relpos
