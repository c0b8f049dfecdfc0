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
  T of_step[STEPS][4];

  // How many steps, from this one on, lie in one piece; and where in the row those of this lane do.
  __device__ __forceinline__ static int at_once(int step) { return sizeof(T) == 2 && step / 2 * 2 + 1 < STEPS ? 2 : 1; }
  __device__ __forceinline__ static int column(int step) {
    const int lane = threadIdx.x % 4;
    return at_once(step) == 2 ? step / 2 * 32 + lane * 8 + step % 2 * 4 : step * 16 + lane * 4;
  }
  // From element d of a row on; zeros past its width.
  __device__ __forceinline__ void load(const T* row, int d, int width) {
#pragma unroll
    for (int step = 0; step < STEPS; step += at_once(step))
      if (at_once(step) * sizeof(T) == 4)
        load_piece<uint4>(step, row, d + column(step), width);
      else
        load_piece<uint2>(step, row, d + column(step), width);
  }
  template <typename V>
  __device__ __forceinline__ void load_piece(int step, const T* row, int own, int width) {
    V piece = {};
    if (own < width) piece = *reinterpret_cast<const V*>(row + own);
    memcpy(static_cast<void*>(of_step[step]), &piece, sizeof piece);
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
