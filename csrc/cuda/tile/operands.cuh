// operands.cuh - rows of tokens in shared memory, and the operands of a product that tensor cores take from there.
//
// One step multiplies a [16 x 16] with b [16 x 8], whatever the dtype. Lane 4 g + t holds
//
//   of a     rows g, g + 8                            columns 2t, 2t + 1, 2t + 8, 2t + 9
//   of b     rows 2t, 2t + 1, 2t + 8, 2t + 9          column g
//   of acc   rows g, g + 8 (elements 0, 1 and 2, 3)   columns 2t, 2t + 1
//
// so that two neighbouring blocks of an acc are an a. Half precision is one instruction. float32 is split in three
// bfloat16, largest first: six products, an error below 2^-25 of each. They are summed by themselves and then added:
// tensor cores cut sums off instead of rounding them, which over many steps is more than float32 allows.
#pragma once
#include "../../plan_attention.h"
#include "long_sum.cuh"
#include "row_steps.cuh"

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

// A pair of float32 in three pairs of bfloat16; PAIRS of such pairs.
template <int PAIRS>
struct SplitPairs {
  uint32_t part[3][PAIRS];

  __device__ __forceinline__ void set(int i, float x, float y) {
#pragma unroll
    for (int n = 0; n < 3; ++n) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
      memcpy(&part[n][i], &two, sizeof two);
      x -= __low2float(two), y -= __high2float(two);
    }
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
  // A step of RowSteps of rows `row` and on.
  template <int STEPS, int D>
  __device__ __forceinline__ void load_spread(const Tile<T, D>& from, int row, int step) {
    load_spread_rows<STEPS>(pairs, from.at(row, 0), Tile<T, D>::kLd, step);
  }
};

template <>
struct OperandA<float> {
  SplitPairs<4> pairs;

  template <int D>
  __device__ __forceinline__ void load(const Tile<float, D>& from, int row, int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = from.at(row + lane / 4 + i % 2 * 8, step * 16 + lane % 4 * 2 + i / 2 * 8);
      const float2 two = *reinterpret_cast<const float2*>(pair);
      pairs.set(i, two.x, two.y);
    }
  }
  __device__ __forceinline__ void set(const float (&left)[4], const float (&right)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pairs.set(i, left[2 * i], left[2 * i + 1]);
      pairs.set(2 + i, right[2 * i], right[2 * i + 1]);
    }
  }
  template <int STEPS, int D>
  __device__ __forceinline__ void load_spread(const Tile<float, D>& from, int row, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* four = from.at(row + threadIdx.x % 32 / 4 + i * 8, RowSteps<float, STEPS>::column(step));
      const float4 x = *reinterpret_cast<const float4*>(four);
      pairs.set(i, x.x, x.y);
      pairs.set(2 + i, x.z, x.w);
    }
  }
};

template <typename T>
struct OperandB {
  uint32_t pairs[2];

  // A step of row g.
  __device__ __forceinline__ void set_row(const uint32_t (&row)[2]) { pairs[0] = row[0], pairs[1] = row[1]; }
};

template <>
struct OperandB<float> {
  SplitPairs<2> pairs;

  __device__ __forceinline__ void set_row(const uint32_t (&row)[4]) {
    float x[4];
    memcpy(x, row, sizeof x);
#pragma unroll
    for (int i = 0; i < 2; ++i) pairs.set(i, x[2 * i], x[2 * i + 1]);
  }
};

// b = the transpose of two blocks of 8 rows, left and right, elements 16 step .. 16 step + 15; from the first row of
// one to that of the other it is `next`.
template <typename T, int D>
__device__ __forceinline__ void load_transposed(OperandB<T> (&b)[2], const Tile<T, D>& from, int row, int step,
                                                int next = 8) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t four[4];
    ldmatrix_x4(four, from.chunk(row + lane / 16 * next + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].pairs[i % 2] = four[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = from.at(row + i / 2 * next + lane / 4, step * 16 + lane % 4 * 2 + i % 2 * 8);
      const float2 two = *reinterpret_cast<const float2*>(pair);
      b[i / 2].pairs.set(i % 2, two.x, two.y);
    }
  }
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

// b = two blocks of 8 rows as they are, one below the other, columns 8 block .. 8 block + 15: left and right.
template <typename T, int D>
__device__ __forceinline__ void load_straight(OperandB<T> (&b)[2], const Tile<T, D>& from, int row, int block,
                                              int next = 8) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int of_lane = next == 8 ? lane % 16 : lane / 8 % 2 * next + lane % 8;  // known to the compiler
    uint32_t four[4];
    ldmatrix_x4_trans(four, from.chunk(row + of_lane, block + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].pairs[i % 2] = four[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* upper = from.at(row + lane % 4 * 2 + i % 2 * next, (block + i / 2) * 8 + lane / 4);
      b[i / 2].pairs.set(i % 2, *upper, upper[Tile<T, D>::kLd]);
    }
  }
}

// acc += a b. SWAPPED: rounded as the transposed product is that is not.
template <bool SWAPPED = false, typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const OperandA<T>& a, const OperandB<T>& b) {
  mma_m16n8k16<T>(acc, a.pairs, b.pairs);
}
template <bool SWAPPED>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const OperandA<float>& a, const OperandB<float>& b) {
#pragma unroll
  for (int order = 2; order >= 0; --order)  // the small ones first
#pragma unroll
    for (int n = 0; n <= order; ++n) {
      const int of_a = SWAPPED ? order - n : n;
      mma_m16n8k16<__nv_bfloat16>(sum, a.pairs.part[of_a], b.pairs.part[order - of_a]);
    }
}
template <bool SWAPPED = false>
__device__ __forceinline__ void multiply(float (&acc)[4], const OperandA<float>& a, const OperandB<float>& b) {
  float sum[4] = {};
  multiply_parts<SWAPPED>(sum, a, b);
#pragma unroll
  for (int e = 0; e < 4; ++e) acc[e] += sum[e];
}
__device__ __forceinline__ void multiply(LongSum (&acc)[4], const OperandA<float>& a, const OperandB<float>& b) {
  float sum[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = acc[e].missing;
  multiply_parts<false>(sum, a, b);
#pragma unroll
  for (int e = 0; e < 4; ++e) acc[e].settle(sum[e]);
}

// ---- products of a warp's strips of 16 rows

// In float32 only four products are under way at once, for their sums take registers, and rows end at their `width`.
template <typename T, int D>
constexpr int kStepsUnrolled = sizeof(T) == 2 ? D / 16 : 2;
template <typename T, int D>
__device__ __forceinline__ int steps_of(int width) {
  return sizeof(T) == 2 ? D / 16 : ceil_div(width, 16);
}
template <typename T>
__device__ __forceinline__ bool ends_before(int block, int width) {
  return sizeof(T) == 4 && block % 4 == 0 && width <= block * 8;
}

// acc[s][j] += a, times rows b_row + next * j .. of b, transposed; a(s, step) is a step of the strip's operand.
template <bool SWAPPED = false, typename T, int D, int STRIPS, int BLOCKS, typename A>
__device__ __forceinline__ void add_products(float (&acc)[STRIPS][BLOCKS][4], A&& a, const Tile<T, D>& b, int b_row,
                                             int width, int next = 8) {
#pragma unroll(kStepsUnrolled<T, D>)
  for (int step = 0; step < steps_of<T, D>(width); ++step) {
    OperandA<T> rows[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) rows[s] = a(s, step);
#pragma unroll
    for (int j = 0; j < BLOCKS; j += 2) {
      OperandB<T> columns[2];
      load_transposed(columns, b, b_row + j * next, step, next);
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
        multiply<SWAPPED>(acc[s][j], rows[s], columns[0]);
        multiply<SWAPPED>(acc[s][j + 1], rows[s], columns[1]);
      }
    }
  }
}

// The strips of a warp, from row `row` of a tile on, as such an a: the first HELD of them stay in registers.
template <typename T, int D, int HELD>
struct StripRows {
  OperandA<T> held[HELD > 0 ? HELD : 1][D / 16];
  Tile<T, D> tile;
  int row;

  __device__ __forceinline__ StripRows(const Tile<T, D>& tile, int row) : tile(tile), row(row) {}
  __device__ __forceinline__ void hold(const Tile<T, D>& from) {
#pragma unroll
    for (int s = 0; s < HELD; ++s)
#pragma unroll
      for (int step = 0; step < D / 16; ++step) held[s][step].load(from, row + s * 16, step);
  }
  __device__ __forceinline__ OperandA<T> operator()(int s, int step) const {
    if (s < HELD) return held[s][step];
    OperandA<T> loaded;
    loaded.load(tile, row + s * 16, step);
    return loaded;
  }
};

// acc[s] += weights[s], times rows b_row .. of b, in blocks of 8 as there
template <typename Acc, typename T, int D, int STRIPS, int BLOCKS>
__device__ __forceinline__ void add_weighted(Acc (&acc)[STRIPS][D / 8][4], const float (&weights)[STRIPS][BLOCKS][4],
                                             const Tile<T, D>& b, int b_row, int width, int next = 8) {
#pragma unroll
  for (int j = 0; j < BLOCKS; j += 2) {
    OperandA<T> rows[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) rows[s].set(weights[s][j], weights[s][j + 1]);
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
      if (ends_before<T>(d, width)) break;
      OperandB<T> columns[2];
      load_straight(columns, b, b_row + j * next, d, next);
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
        multiply(acc[s][d], rows[s], columns[0]);
        multiply(acc[s][d + 1], rows[s], columns[1]);
      }
    }
  }
}

}  // namespace relpos
