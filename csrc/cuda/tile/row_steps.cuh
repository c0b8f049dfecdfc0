// row_steps.cuh - operands of a product of which each lane loads its own by itself, as from rows of global memory.
#pragma once
#include "copy.cuh"

namespace relpos {

// STEPS steps of a row of which each lane loads its own by itself, 16 bytes at once where it can. Products do not mind
// in which order their elements are summed, if both operands have the same. Lane t takes for its columns of a step
//
//   of 16 elements                     4t .. 4t + 3
//   of 32 elements of half precision   8t .. 8t + 3 for one step, 8t + 4 .. 8t + 7 for the next
template <typename T, int STEPS>
struct RowSteps {
  uint32_t of_step[STEPS][sizeof(T)];  // four elements, as words

  // Where in the row the columns of a step lie that this lane has.
  __device__ __forceinline__ static int column(int step) {
    const int lane = threadIdx.x % 4;
    const bool of_two = sizeof(T) == 2 && step / 2 * 2 + 1 < STEPS;  // in one piece
    return of_two ? step / 2 * 32 + lane * 8 + step % 2 * 4 : step * 16 + lane * 4;
  }
  // From element d of a row on; zeros past its width.
  __device__ __forceinline__ void load(const T* row, int d, int width) {
    constexpr int kAtOnce = 4 / sizeof(T);
#pragma unroll
    for (int step = 0; step + kAtOnce <= STEPS; step += kAtOnce) load_piece<uint4>(step, row, d + column(step), width);
    if constexpr (STEPS % kAtOnce != 0) load_piece<uint2>(STEPS - 1, row, d + column(STEPS - 1), width);
  }
  template <typename V>
  __device__ __forceinline__ void load_piece(int step, const T* row, int own, int width) {
    constexpr int kWords = sizeof(V) / 4;
    V piece = {};
    if (own < width) piece = *reinterpret_cast<const V*>(row + own);
    uint32_t words[kWords];
    memcpy(words, &piece, sizeof piece);
#pragma unroll
    for (int i = 0; i < kWords; ++i) of_step[step + i / sizeof(T)][i % sizeof(T)] = words[i];
  }
};

// The operand a of a step, half precision, rows 0 .. 15 from `rows` on, `ld` from row to row. Pair by pair: so it lies
// in neighbouring registers as it is loaded, and need not be put together.
template <int STEPS, typename T>
__device__ __forceinline__ void load_spread_rows(uint32_t (&a)[4], const T* rows, int ld, int step) {
  const T* own = rows + threadIdx.x % 32 / 4 * ld + RowSteps<T, STEPS>::column(step);
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const uint32_t*>(own + i % 2 * 8 * ld + i / 2 * 2);
}

}  // namespace relpos
