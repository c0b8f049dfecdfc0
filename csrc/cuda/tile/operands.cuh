// operands.cuh - rows of tokens in shared memory, and the operands of a product that tensor cores take from there.
//
// One step multiplies a [16 x 16] with b [16 x 8], whatever the dtype. Lane 4 g + t holds
//
//   of a     rows g, g + 8                            columns 2t, 2t + 1, 2t + 8, 2t + 9
//   of b     rows 2t, 2t + 1, 2t + 8, 2t + 9          column g
//   of acc   rows g, g + 8 (elements 0, 1 and 2, 3)   columns 2t, 2t + 1
//
// so that two neighbouring blocks of an acc are an a. Here half precision, one instruction; float32 is in split.cuh.
#pragma once
#include "../../plan_attention.h"
#include "row_steps.cuh"

namespace relpos {

// [rows, D]; a chunk of 16 bytes behind each row lets a column of 8 chunks lie in all 32 banks.
template <typename T, int D, int LD = tile_ld(D, sizeof(T))>
struct Tile {
  using Element = T;
  static constexpr int kD = D, kLd = LD;
  static constexpr int kChunk = kVector<T>, kChunks = D / kChunk;  // elements of a chunk, chunks of a row
  static_assert(D % 16 == 0, "products take 16 elements at a time");
  T* data;

  __device__ __forceinline__ T* at(int row, int d) const { return data + row * kLd + d; }
  __device__ __forceinline__ T* chunk(int row, int c) const { return at(row, c * kChunk); }
};

template <typename T>
struct OperandA {
  uint32_t pairs[4];  // (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour

  template <int D, int LD>
  __device__ __forceinline__ void load(const Tile<T, D, LD>& from, int row, int step) {
    const int lane = threadIdx.x % 32;
    ldmatrix_x4(pairs, from.chunk(row + lane % 16, step * 2 + lane / 16));
  }
  __device__ __forceinline__ void set(const float (&left)[4], const float (&right)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      set_pair(reinterpret_cast<T*>(pairs + i), left[2 * i], left[2 * i + 1]);
      set_pair(reinterpret_cast<T*>(pairs + 2 + i), right[2 * i], right[2 * i + 1]);
    }
  }
  // What rounding has taken away, of what it was set to.
  __device__ __forceinline__ void leave_rest(float (&left)[4], float (&right)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T two[2];
      memcpy(static_cast<void*>(two), pairs + i, sizeof two);
      float* from = (i < 2 ? left : right) + i % 2 * 2;
      from[0] -= to_float(two[0]), from[1] -= to_float(two[1]);
    }
  }
  // A step of RowSteps of rows `row` and on, from element d on.
  template <int STEPS, int D, int LD>
  __device__ __forceinline__ void load_spread(const Tile<T, D, LD>& from, int row, int d, int step) {
    load_spread_rows<STEPS>(pairs, from.at(row, d), LD, step);
  }
};

template <typename T>
struct OperandB {
  uint32_t pairs[2];

  // A step of row g.
  __device__ __forceinline__ void set_row(const uint32_t (&row)[2]) { pairs[0] = row[0], pairs[1] = row[1]; }
};

// b = the transpose of two blocks of 8 rows, left and right, elements 16 step .. 16 step + 15; from the first row of
// one to that of the other it is `next`.
template <typename T, int D, int LD>
__device__ __forceinline__ void load_transposed(OperandB<T> (&b)[2], const Tile<T, D, LD>& from, int row, int step,
                                                int next = 8) {
  const int lane = threadIdx.x % 32;
  uint32_t four[4];
  ldmatrix_x4(four, from.chunk(row + lane / 16 * next + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2].pairs[i % 2] = four[i];
}

// b = two blocks of 8 rows as they are, one below the other, columns 8 block .. 8 block + 15: left and right.
template <typename T, int D, int LD>
__device__ __forceinline__ void load_straight(OperandB<T> (&b)[2], const Tile<T, D, LD>& from, int row, int block,
                                              int next = 8) {
  const int lane = threadIdx.x % 32;
  const int of_lane = next == 8 ? lane % 16 : lane / 8 % 2 * next + lane % 8;  // known to the compiler
  uint32_t four[4];
  ldmatrix_x4_trans(four, from.chunk(row + of_lane, block + lane / 16));
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2].pairs[i % 2] = four[i];
}

// a = the transpose of 16 rows from `row` on, columns from `column` on, a multiple of 8; `ld` from row to row.
template <typename T>
__device__ __forceinline__ void load_transposed(OperandA<T>& a, const T* from, int ld, int row, int column) {
  static_assert(sizeof(T) == 2);
  const int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(a.pairs, from + (row + lane / 16 * 8 + lane % 8) * ld + column + lane / 8 % 2 * 8);
}

// pairs[j] = the transpose of block j of 8 rows of 8: lane l brings the address of row l.
__device__ __forceinline__ void load_blocks_transposed(uint32_t (&pairs)[4], const void* row) {
  ldmatrix_x4_trans(pairs, row);
}
__device__ __forceinline__ void load_blocks_transposed(uint32_t (&pairs)[2], const void* row) {
  ldmatrix_x2_trans(pairs, row);
}

// acc += a b. SWAPPED: rounded as the transposed product is that is not.
template <bool SWAPPED = false, typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const OperandA<T>& a, const OperandB<T>& b) {
  mma_m16n8k16<T>(acc, a.pairs, b.pairs);
}

}  // namespace relpos
