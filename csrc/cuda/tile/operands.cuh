// operands.cuh - rows of tokens in shared memory, and the operands of a product that tensor cores take from there.
//
// One step multiplies a [16 x 16] with b [16 x 8], whatever the dtype. Lane 4 g + t holds
//
//   of a     rows g, g + 8                            columns 2t, 2t + 1, 2t + 8, 2t + 9
//   of b     rows 2t, 2t + 1, 2t + 8, 2t + 9          column g
//   of acc   rows g, g + 8 (elements 0, 1 and 2, 3)   columns 2t, 2t + 1
//
// so that two neighbouring blocks of an acc are an a. Half precision is one instruction. float32 is split in two tf32
// numbers, x = high + low: three products, an error of about 2^-22, each of two instructions of depth 8.
#pragma once
#include "../../plan_attention.h"
#include "copy.cuh"

namespace relpos {

// [rows, D]; a chunk of 16 bytes behind each row lets a column of 8 chunks lie in all 32 banks.
template <typename T, int D>
struct Tile {
  static constexpr int kChunk = kVector<T>, kChunks = D / kChunk;  // elements of a chunk, chunks of a row
  static constexpr int kLd = tile_ld(D, sizeof(T));
  static_assert(D % 16 == 0, "products take 16 elements at a time");
  T* data;

  __device__ __forceinline__ T* at(int row, int d) const { return data + row * kLd + d; }
  __device__ __forceinline__ T* chunk(int row, int c) const { return at(row, c * kChunk); }
};

// Two neighbours, aligned as a pair.
__device__ __forceinline__ void set_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = {x, y}; }
__device__ __forceinline__ void set_pair(__half* to, float x, float y) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(x, y);
}
__device__ __forceinline__ void set_pair(__nv_bfloat16* to, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
}

// x = high + low, N numbers.
template <int N>
struct SplitNumbers {
  uint32_t high[N], low[N];

  __device__ __forceinline__ void set(int i, float x) {
    high[i] = to_tf32(x);
    float rest;
    memcpy(&rest, &high[i], sizeof rest);
    low[i] = to_tf32(x - rest);
  }
};

template <typename T>
struct OperandA {
  uint32_t pairs[4];  // (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour

  template <int D>
  __device__ __forceinline__ void load(const Tile<T, D>& from, int row, int step) {
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
};

template <>
struct OperandA<float> {
  SplitNumbers<8> x;  // the pairs, one after another

  template <int D>
  __device__ __forceinline__ void load(const Tile<float, D>& from, int row, int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = from.at(row + lane / 4 + i % 2 * 8, step * 16 + lane % 4 * 2 + i / 2 * 8);
      const float2 two = *reinterpret_cast<const float2*>(pair);
      x.set(2 * i, two.x), x.set(2 * i + 1, two.y);
    }
  }
  __device__ __forceinline__ void set(const float (&left)[4], const float (&right)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x.set(i, left[i]), x.set(4 + i, right[i]);
  }
};

template <typename T>
struct OperandB {
  uint32_t pairs[2];

  // Row g is `row` of global memory, elements d .. d + 15 of it; zeros past D or where it does not exist.
  __device__ __forceinline__ void load_row(const T* row, int d, int D, bool exists) {
    const T* pair = row + d + threadIdx.x % 4 * 2;
    pairs[0] = exists && d < D ? *reinterpret_cast<const uint32_t*>(pair) : 0u;
    pairs[1] = exists && d + 8 < D ? *reinterpret_cast<const uint32_t*>(pair + 8) : 0u;
  }
};

template <>
struct OperandB<float> {
  SplitNumbers<4> x;

  __device__ __forceinline__ void load_row(const float* row, int d, int D, bool exists) {
    const float* pair = row + d + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) x.set(i, exists && d + i / 2 * 8 < D ? pair[i / 2 * 8 + i % 2] : 0.f);
  }
};

// b = the transpose of 16 rows, elements 16 step .. 16 step + 15: their blocks of 8 rows, left and right.
template <typename T, int D>
__device__ __forceinline__ void load_transposed(OperandB<T> (&b)[2], const Tile<T, D>& from, int row, int step) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t four[4];
    ldmatrix_x4(four, from.chunk(row + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].pairs[i % 2] = four[i];
  } else {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[n].x.set(i, *from.at(row + n * 8 + lane / 4, step * 16 + lane % 4 * 2 + i / 2 * 8 + i % 2));
  }
}

// b = 16 rows as they are, columns 8 block .. 8 block + 15: left and right.
template <typename T, int D>
__device__ __forceinline__ void load_straight(OperandB<T> (&b)[2], const Tile<T, D>& from, int row, int block) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t four[4];
    ldmatrix_x4_trans(four, from.chunk(row + lane % 16, block + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].pairs[i % 2] = four[i];
  } else {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[n].x.set(i, *from.at(row + lane % 4 * 2 + i / 2 * 8 + i % 2, (block + n) * 8 + lane / 4));
  }
}

// acc += a b
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const OperandA<T>& a, const OperandB<T>& b) {
  mma_m16n8k16<T>(acc, a.pairs, b.pairs);
}
__device__ __forceinline__ void multiply(float (&acc)[4], const OperandA<float>& a, const OperandB<float>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = half * 4 + i % 2 * 2 + i / 2;
      a_high[i] = a.x.high[at], a_low[i] = a.x.low[at];
      b_high[i / 2] = b.x.high[half * 2 + i / 2], b_low[i / 2] = b.x.low[half * 2 + i / 2];
    }
    mma_m16n8k8_tf32(acc, a_low, b_high);  // the small ones first
    mma_m16n8k8_tf32(acc, a_high, b_low);
    mma_m16n8k8_tf32(acc, a_high, b_high);
  }
}

// ---- products of a warp's strips of 16 rows

// acc[s][j] += rows a_row + 16 s .. of a, times rows b_row + 8 j .. of b, transposed
template <typename T, int D, int STRIPS, int BLOCKS>
__device__ __forceinline__ void add_products(float (&acc)[STRIPS][BLOCKS][4], const Tile<T, D>& a, int a_row,
                                             const Tile<T, D>& b, int b_row) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    OperandA<T> rows[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) rows[s].load(a, a_row + s * 16, step);
#pragma unroll
    for (int j = 0; j < BLOCKS; j += 2) {
      OperandB<T> columns[2];
      load_transposed(columns, b, b_row + j * 8, step);
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
        multiply(acc[s][j], rows[s], columns[0]);
        multiply(acc[s][j + 1], rows[s], columns[1]);
      }
    }
  }
}

// acc[s] += weights[s], times rows b_row .. of b
template <typename T, int D, int STRIPS, int BLOCKS>
__device__ __forceinline__ void add_weighted(float (&acc)[STRIPS][D / 8][4], const float (&weights)[STRIPS][BLOCKS][4],
                                             const Tile<T, D>& b, int b_row) {
#pragma unroll
  for (int j = 0; j < BLOCKS; j += 2) {
    OperandA<T> rows[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) rows[s].set(weights[s][j], weights[s][j + 1]);
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
      OperandB<T> columns[2];
      load_straight(columns, b, b_row + j * 8, d);
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
        multiply(acc[s][d], rows[s], columns[0]);
        multiply(acc[s][d + 1], rows[s], columns[1]);
      }
    }
  }
}

}  // namespace relpos
