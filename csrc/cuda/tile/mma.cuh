// mma.cuh - products of a float32 operand with a half precision one on tensor cores.
//
// The float32 operand is split, x = high + low, both in the half type: two products, an error of 2^-16 (bfloat16) or
// 2^-22 (float16) of x, far below the rounding of a result in that type.
#pragma once
#include "../../plan.h"
#include "copy.cuh"

namespace relpos {

constexpr int kProductRows = 64, kProductColumns = kMaxProductD;  // largest tile of one block
constexpr int kProductBlocks = 8;                                 // of 8 columns, per warp

template <typename T>
__device__ __forceinline__ void split(float x, T& high, T& low) {
  high = from_float<T>(x);
  low = from_float<T>(x - to_float(high));
}

// The same of two at once, as pairs.
template <typename T>
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
  set_pair(reinterpret_cast<T*>(&high), x, y);
  const float2 two = unpack_pair<T>(high);
  set_pair(reinterpret_cast<T*>(&low), x - two.x, y - two.y);
}

// How the 8 warps share a tile of 16, 32 or 64 rows x `columns`: strips of 16 rows, runs of blocks of 8 columns.
struct WarpShare {
  int strip, first_block, blocks;

  __device__ __forceinline__ WarpShare(int rows, int columns) {
    const int warp = threadIdx.x / 32, strips = ceil_div(rows, 16), runs = 8 / strips;
    const int all = ceil_div(columns, 8), each = ceil_div(all, runs);
    strip = warp % strips;
    first_block = warp / strips * each;
    blocks = max(0, min(each, all - first_block));
  }
};

// acc += (high + low) * b over a depth of kProductDepth. In shared memory: b [depth, b_ld]; high, low [rows, a_ld].
template <typename T>
__device__ __forceinline__ void accumulate(float (&acc)[kProductBlocks][4], const WarpShare& mine, const T* high,
                                           const T* low, int a_ld, const T* b, int b_ld) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k0 = 0; k0 < kProductDepth; k0 += 16) {
    const int at = (mine.strip * 16 + lane % 16) * a_ld + k0 + lane / 16 * 8;
    uint32_t high_regs[4], low_regs[4];
    ldmatrix_x4(high_regs, high + at);
    ldmatrix_x4(low_regs, low + at);
#pragma unroll
    for (int n = 0; n < kProductBlocks; ++n) {
      if (n >= mine.blocks) break;
      uint32_t b_regs[2];
      ldmatrix_x2_trans(b_regs, b + (k0 + lane % 16) * b_ld + (mine.first_block + n) * 8);
      mma_m16n8k16<T>(acc[n], high_regs, b_regs);
      mma_m16n8k16<T>(acc[n], low_regs, b_regs);
    }
  }
}

// Calls put(row, column, value) for every element this lane holds.
template <typename F>
__device__ __forceinline__ void for_each_element(const float (&acc)[kProductBlocks][4], const WarpShare& mine,
                                                 F&& put) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kProductBlocks; ++n) {
    if (n >= mine.blocks) break;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      put(mine.strip * 16 + lane / 4 + e / 2 * 8, (mine.first_block + n) * 8 + lane % 4 * 2 + e % 2, acc[n][e]);
  }
}

}  // namespace relpos
