// attention_fwd_sm90.cuh - the forward of attention_fwd.cuh with what sm_90 has: TMA brings keys, warpgroups multiply.
//
//   warps 0 - 3   a warpgroup: queries 0 .. 63 of the block, a strip of 16 per warp
//   warps 4 - 7   another: queries 64 .. 127. Nothing but the copies joins them: one multiplies while one takes powers
//   warps 8 - 11  one thread asks TMA for one tile of keys and values after another; they give their registers away
//
//   grid     (groups * ceil(M / 128)), the blocks of a group next to each other: they share its keys in L2.
//   tile     a box of the keys, [D, columns of the span, lines of the tile]: rows as in attention_fwd.cuh. What lies
//            past the last column, the last line or D is zero. Each 64 elements of D are a matrix of rows of 128 bytes,
//            swizzled; k is K-major, v is MN-major to wgmma.
//   bias     as there: scores start from the column factors, which wgmma accumulates to.
//   barriers full[s]: k and v of stage s have arrived. empty[s]: all eight warps are done with them.
#pragma once
#include "tile/softmax.cuh"

namespace relpos {

struct AttentionFwdSm90Params : AttentionFwdParams {
  TensorMap k_map, v_map;
};

// Stages one after another, and the parity of the phase that their barriers are in.
struct StageRing {
  int count, stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == count) stage = 0, parity ^= 1;
  }
};

template <int N>
__device__ __forceinline__ auto flat(float (&x)[N][4]) -> float (&)[4 * N] {
  return reinterpret_cast<float (&)[4 * N]>(x);
}

// The two matrices of a stage, of BLOCKS * 8 rows.
template <typename T, int D, int BLOCKS>
struct Sm90Stages {
  static constexpr int kSpan = BLOCKS * 8 * kSm90Row * 2;  // bytes of 64 elements of D
  static constexpr int kMatrix = static_cast<int>(sm90_matrix_bytes(BLOCKS, D));
  static constexpr int kCores = 8 * kSm90Row * 2;  // bytes of 8 rows
  unsigned char* data;

  __device__ __forceinline__ unsigned char* k(int stage) const { return data + stage * 2 * kMatrix; }
  __device__ __forceinline__ unsigned char* v(int stage) const { return k(stage) + kMatrix; }

  // Columns that no box covers are read by products, whose result does not count; but it must not be NaN.
  __device__ __forceinline__ void clear(int count) const {
    for (int i = threadIdx.x * 16; i < count * 2 * kMatrix; i += kSm90Threads * 16)
      *reinterpret_cast<uint4*>(data + i) = uint4{};
    fence_proxy_async();
  }

  __device__ __forceinline__ void load(const AttentionFwdSm90Params& p, const BlockPlace& block, int stage,
                                       uint64_t* full, int column, int line) const {
    const int spans = ceil_div(D, kSm90Row);
    mbarrier_expect_bytes(full, 2 * spans * p.keys.lines * p.keys.columns * kSm90Row * 2);
#pragma unroll
    for (int i = 0; i < spans; ++i) {
      const int at[5] = {i * kSm90Row, column, line, block.head, block.batch};
      tma_load<5>(k(stage) + i * kSpan, p.k_map, full, at);
      tma_load<5>(v(stage) + i * kSpan, p.v_map, full, at);
    }
  }

  // score += q, times the keys, transposed
  __device__ __forceinline__ void add_scores(float (&score)[BLOCKS][4], OperandA<T> (&q)[D / 16], int stage) const {
    const uint64_t keys = wgmma_descriptor(k(stage), 16, kCores, Swizzle::k128);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) pin(q[step].pairs);
    wgmma_fence(flat(score));
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      wgmma_rs<T, BLOCKS * 8, false>(flat(score), q[step].pairs,
                                     keys + (step * 16 / kSm90Row * kSpan + step * 16 % kSm90Row * 2) / 16, true);
    wgmma_commit();
    wgmma_wait<0>(flat(score));
  }

  // out += weights, times the values
  __device__ __forceinline__ void add_weighted(float (&out)[D / 8][4], const float (&weights)[BLOCKS][4],
                                               int stage) const {
    const uint64_t values = wgmma_descriptor(v(stage), kSpan, kCores, Swizzle::k128);
    OperandA<T> rows[BLOCKS / 2];
#pragma unroll
    for (int j = 0; j < BLOCKS / 2; ++j) {
      rows[j].set(weights[2 * j], weights[2 * j + 1]);
      pin(rows[j].pairs);
    }
    wgmma_fence(flat(out));
#pragma unroll
    for (int j = 0; j < BLOCKS / 2; ++j)
      wgmma_rs<T, D, true>(flat(out), rows[j].pairs, values + j * 2 * kCores / 16, true);
    wgmma_commit();
    wgmma_wait<0>(flat(out));
  }
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
struct AttentionFwdSm90 {
  using Stages = Sm90Stages<T, D, BLOCKS>;
  const AttentionFwdSm90Params& p;
  const BlockPlace& block;
  const Stages stages;
  uint64_t *full, *empty;

  // Scores must be moved to what products are added to: many lines join them on the way, and cost nothing after.
  __device__ __forceinline__ void load_lines(const LineFactors<T>& lines, int tile, int row,
                                             float (&line)[BLOCKS][2]) const {
    const Factor<T>* of_tile = &lines.at(tile * p.keys.lines, row);
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        line[j][half] = kWithBias ? to_float(of_tile[p.keys.line_of[j] * kSm90Rows + half * 8]) : 0.f;
  }
  __device__ __forceinline__ void start_from_lines(const StripBias<T, BLOCKS, ONE_LINE>& bias,
                                                   float (&score)[BLOCKS][4], float (&line)[BLOCKS][2]) const {
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        score[j][e] = kWithBias ? fmaf(line[j][e / 2], p.from_powers, bias.column[j][e]) : 0.f;
      line[j][0] = line[j][1] = 0.f;
    }
  }

  // By one thread.
  __device__ __forceinline__ void produce() const {
    StageRing ring{p.at_sm90.stage_count};
    for (int i = 0; i < p.keys.spans; ++i)
      for (int tile = 0; tile < p.keys.tiles; ++tile, ring.advance()) {
        mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
        stages.load(p, block, ring.stage, full + ring.stage, i * p.keys.columns, tile * p.keys.lines);
      }
  }

  // By a warp, queries `first` and on; `stage`: its own.
  __device__ __forceinline__ void consume(int first, const Coordinates* rows, const Tile<T, D>& q,
                                          const LineFactors<T>& lines, float* stage) const {
    constexpr float kNothing[2] = {};
    OnlineSoftmax<T, D, 1, BLOCKS, true> mine;
    StripBias<T, BLOCKS, ONE_LINE> bias;
    bias.first = first;
    lines.fill(p, rows, q, first, stage);
    StageRing ring{p.at_sm90.stage_count};
    for (int i = 0; i < p.keys.spans; ++i) {
      const Span span = span_of(p, i);
      bias.fill_columns(p, span, rows, q, kNothing, kNothing, stage);
      for (int tile = 0; tile < p.keys.tiles; ++tile, ring.advance()) {
        float score[1][BLOCKS][4], line[1][BLOCKS][2];
        if constexpr (ONE_LINE)
          bias.start(p, lines, span, tile, 0, score[0], line[0]);
        else
          load_lines(lines, tile, bias.row(0), line[0]);
        OperandA<T> rows_of_q[D / 16];  // anew for every tile: kept, ptxas 13.0 gives their registers away meanwhile
#pragma unroll
        for (int step = 0; step < D / 16; ++step) rows_of_q[step].load(q, first, step);
        mbarrier_wait(full + ring.stage, ring.parity);
        if constexpr (!ONE_LINE) start_from_lines(bias, score[0], line[0]);
        stages.add_scores(score[0], rows_of_q, ring.stage);
        mine.weigh(p, score, line);
        stages.add_weighted(mine.out[0], score[0], ring.stage);
        __syncwarp();  // all lanes have read the stage
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + ring.stage);
      }
    }
    mine.store(p, block, 0, first, lines.largest, q);
  }
};

template <typename T, int D, int BLOCKS, bool ONE_LINE>
__global__ void __launch_bounds__(kSm90Threads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ AttentionFwdSm90Params p) {
  RELPOS_DYNAMIC_SHARED_1024(shared);
  using At = AttentionFwdSm90Shared;
  const At& at = p.at_sm90;
  Coordinates* rows = reinterpret_cast<Coordinates*>(shared + At::rows);
  const Tile<T, D> q{reinterpret_cast<T*>(shared + at.q)};
  const LineFactors<T> lines{reinterpret_cast<Factor<T>*>(shared + at.lines), kSm90Rows,
                             reinterpret_cast<float*>(shared + At::largest)};
  const AttentionFwdSm90<T, D, BLOCKS, ONE_LINE> work{p,
                                                      *reinterpret_cast<const BlockPlace*>(shared),
                                                      {shared + At::stages},
                                                      reinterpret_cast<uint64_t*>(shared + At::full),
                                                      reinterpret_cast<uint64_t*>(shared + At::empty)};
  if (threadIdx.x == 0) {
    find_place(p, static_cast<int>(p.shape.M()), *reinterpret_cast<BlockPlace*>(shared));
    for (int s = 0; s < at.stage_count; ++s) {
      mbarrier_init(work.full + s, 1);
      mbarrier_init(work.empty + s, kSm90Warps);
    }
    mbarrier_fence_init();
  }
  if (p.keys.lines * p.keys.columns < BLOCKS * 8) work.stages.clear(at.stage_count);
  __syncthreads();
  copy_tokens(q, kSm90Rows, p, work.block, p.q, work.block.first, work.block.count);
  cp_async_commit();
  locate_queries(p.shape, work.block, kSm90Rows, rows);
  cp_async_wait<0>();
  __syncthreads();

  const int warp = threadIdx.x / 32;
  if (warp < kSm90Warps) {
    setmaxnreg_inc<240>();
    float* const stage = reinterpret_cast<float*>(shared + at.staged) + warp * 16 * p.keys.staged;
    work.consume(warp * 16, rows, q, lines, stage);
  } else {
    setmaxnreg_dec<24>();
    if (threadIdx.x == 32 * kSm90Warps) work.produce();
  }
}

}  // namespace relpos
