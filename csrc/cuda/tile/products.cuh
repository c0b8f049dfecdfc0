// products.cuh - products of a warp's strips of 16 rows with a tile that the warps of a block share.
#pragma once
#include "split.cuh"

namespace relpos {

// What products read: in half precision a tile as it was copied.
template <typename T, int D>
using ProductTile = std::conditional_t<sizeof(T) == 4, SplitTile<D>, Tile<T, D>>;

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
template <bool SWAPPED = false, int STRIPS, int BLOCKS, typename A, typename Rows>
__device__ __forceinline__ void add_products(float (&acc)[STRIPS][BLOCKS][4], A&& a, const Rows& b, int b_row,
                                             int width, int next = 8) {
  using T = typename Rows::Element;
#pragma unroll(kStepsUnrolled<T, Rows::kD>)
  for (int step = 0; step < steps_of<T, Rows::kD>(width); ++step) {
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
template <typename Rows, int HELD>
struct StripRows {
  using T = typename Rows::Element;
  static constexpr int kSteps = Rows::kD / 16;
  OperandA<T> held[HELD > 0 ? HELD : 1][kSteps];
  Rows tile;
  int row;

  __device__ __forceinline__ StripRows(const Rows& tile, int row) : tile(tile), row(row) {}
  __device__ __forceinline__ void hold(const Rows& from) {
#pragma unroll
    for (int s = 0; s < HELD; ++s)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) held[s][step].load(from, row + s * 16, step);
  }
  __device__ __forceinline__ OperandA<T> operator()(int s, int step) const {
    if (s < HELD) return held[s][step];
    OperandA<T> loaded;
    loaded.load(tile, row + s * 16, step);
    return loaded;
  }
};

// acc[s] += weights[s], times rows b_row .. of b, in blocks of 8 as there
template <typename Acc, int N, int STRIPS, int BLOCKS, typename Rows>
__device__ __forceinline__ void add_weighted(Acc (&acc)[STRIPS][N][4], const float (&weights)[STRIPS][BLOCKS][4],
                                             const Rows& b, int b_row, int width, int next = 8) {
  using T = typename Rows::Element;
  static_assert(N == Rows::kD / 8);
#pragma unroll
  for (int j = 0; j < BLOCKS; j += 2) {
    OperandA<T> rows[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) rows[s].set(weights[s][j], weights[s][j + 1]);
#pragma unroll
    for (int d = 0; d < N; d += 2) {
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
