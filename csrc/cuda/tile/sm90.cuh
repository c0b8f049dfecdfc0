// sm90.cuh - what kernels for sm_90 share: stages that TMA fills, and products of a warpgroup with rows of them.
//
// A warp has 16 rows of the 64 that its warpgroup multiplies, in registers, as it would have them for mma.sync:
// operands and results are those of operands.cuh. start_.. only starts: until wgmma_wait, operands and results are not
// touched.
#pragma once
#include "../../shared_attention.h"
#include "operands.cuh"

namespace relpos {

// Stages one after another, and the parity of the phase that their barriers are in.
struct StageRing {
  int count, stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == count) stage = 0, parity ^= 1;
  }
};

// By one thread. full: what is on its way has arrived. empty: no warp that has something that stays needs it more.
__device__ __forceinline__ void init_stages(uint64_t* full, uint64_t* empty, int count) {
  for (int s = 0; s < count; ++s) {
    mbarrier_init(full + s, 1);
    mbarrier_init(empty + s, kSm90Warps);
  }
}

// What all lanes have done before is done when the phase ends.
__device__ __forceinline__ void arrive_as_warp(uint64_t* bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(bar);
}

// consume(warp) by all warps that have something that stays, produce() by one thread, which needs few registers.
template <typename Consume, typename Produce>
__device__ __forceinline__ void share_work(Consume&& consume, Produce&& produce) {
  const int warp = threadIdx.x / 32;
  if (warp < kSm90Warps) {
    setmaxnreg_inc<240>();
    consume(warp);
  } else {
    setmaxnreg_dec<24>();
    if (threadIdx.x == 32 * kSm90Warps) produce();
  }
}

template <int N>
__device__ __forceinline__ auto flat(float (&x)[N][4]) -> float (&)[4 * N] {
  return reinterpret_cast<float (&)[4 * N]>(x);
}

// The operands of 16 rows of a tile; of weights, block by block.
template <typename T, int D>
struct RowsA {
  OperandA<T> step[D / 16];

  RowsA() = default;
  __device__ __forceinline__ RowsA(const Tile<T, D>& from, int first) { load(from, first); }
  __device__ __forceinline__ void load(const Tile<T, D>& from, int first) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) step[i].load(from, first, i);
  }
};
template <typename T, int BLOCKS>
struct WeightsA {
  OperandA<T> step[BLOCKS / 2];

  __device__ __forceinline__ void set(const float (&weights)[BLOCKS][4]) {
#pragma unroll
    for (int i = 0; i < BLOCKS / 2; ++i) step[i].set(weights[2 * i], weights[2 * i + 1]);
  }
};

// ROWS rows of D elements in shared memory, swizzled: each 64 elements of D are a matrix of rows of 128 bytes, zero
// past D. As columns of a product they are K-major to wgmma; as its depth, MN-major.
template <typename T, int D, int ROWS>
struct SwizzledRows {
  static constexpr int kSpans = ceil_div(D, kSm90Row), kSpan = ROWS * kSm90Row * 2;  // bytes of 64 elements of D
  static constexpr int kCores = 8 * kSm90Row * 2;                                    // bytes of 8 rows
  unsigned char* data;

  __device__ __forceinline__ unsigned char* chunk(int row, int c) const {  // of 16 bytes
    return data + c / 8 * kSpan + row * kSm90Row * 2 + (c % 8 ^ row % 8) * 16;
  }

  // By one thread: asks TMA for a box per span, first elements `at`, but for axis 0.
  template <int RANK>
  __device__ __forceinline__ void load(const TensorMap& map, uint64_t* full, int (&at)[RANK]) const {
#pragma unroll
    for (int i = 0; i < kSpans; ++i) {
      at[0] = i * kSm90Row;
      tma_load<RANK>(data + i * kSpan, map, full, at);
    }
  }

  // acc += a, times rows `first` and on, transposed; acc = .. unless ADD.
  template <bool ADD, int BLOCKS>
  __device__ __forceinline__ void start_products(float (&acc)[BLOCKS][4], RowsA<T, D>& a, int first) const {
    const uint64_t rows = wgmma_descriptor(data + first / 8 * kCores, 16, kCores, Swizzle::k128);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) pin(a.step[i].pairs);
    wgmma_fence(flat(acc));
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
      wgmma_rs<T, BLOCKS * 8, false>(flat(acc), a.step[i].pairs,
                                     rows + (i * 16 / kSm90Row * kSpan + i * 16 % kSm90Row * 2) / 16, ADD || i > 0);
    wgmma_commit();
  }

  // acc += a, times rows `first` and on
  template <int BLOCKS>
  __device__ __forceinline__ void start_weighted(float (&acc)[D / 8][4], WeightsA<T, BLOCKS>& a, int first) const {
    const uint64_t rows = wgmma_descriptor(data + first / 8 * kCores, kSpan, kCores, Swizzle::k128);
#pragma unroll
    for (int i = 0; i < BLOCKS / 2; ++i) pin(a.step[i].pairs);
    wgmma_fence(flat(acc));
#pragma unroll
    for (int i = 0; i < BLOCKS / 2; ++i)
      wgmma_rs<T, D, true>(flat(acc), a.step[i].pairs, rows + i * 2 * kCores / 16, true);
    wgmma_commit();
  }
};

// Keys and values in stages; boxes of some columns of some lines, [D, columns, lines, heads, batch].
template <typename T, int D, int BLOCKS>
struct Sm90Stages {
  using Rows = SwizzledRows<T, D, BLOCKS * 8>;
  static constexpr int kMatrix = static_cast<int>(sm90_matrix_bytes(BLOCKS, D));
  unsigned char* data;

  __device__ __forceinline__ Rows k(int stage) const { return {data + stage * 2 * kMatrix}; }
  __device__ __forceinline__ Rows v(int stage) const { return {data + stage * 2 * kMatrix + kMatrix}; }

  // Rows from `covered` on, which no box covers, are read by products whose result does not count; but it must not be
  // NaN. By so many threads.
  __device__ __forceinline__ void clear(int count, int covered, int threads) const {
    const int chunks = (BLOCKS * 8 - covered) * kSm90Row / 8;  // of 16 bytes, per matrix of 64 elements of D
    for (int i = threadIdx.x; i < count * 2 * Rows::kSpans * chunks; i += threads)
      *reinterpret_cast<uint4*>(data + i / chunks * Rows::kSpan + (covered * kSm90Row / 8 + i % chunks) * 16) = uint4{};
  }

  // The tiles of span number i, one after another, each as soon as its stage is free.
  template <typename Params>
  __device__ __forceinline__ void load_span(const Params& p, const BlockPlace& block, int i, StageRing& ring,
                                            uint64_t* full, uint64_t* empty) const {
    for (int tile = 0; tile < p.keys.tiles; ++tile, ring.advance()) {
      uint64_t* const here = full + ring.stage;
      mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
      mbarrier_expect_bytes(here, 2 * Rows::kSpans * p.keys.lines * p.keys.columns * kSm90Row * 2);
      int at[5] = {0, i * p.keys.columns, tile * p.keys.lines, block.head, block.batch};
      k(ring.stage).load(p.k_map, here, at);
      v(ring.stage).load(p.v_map, here, at);
    }
  }
};

}  // namespace relpos
