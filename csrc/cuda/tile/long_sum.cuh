// long_sum.cuh - sums of so many numbers that float32 must take care of what rounding takes away.
#pragma once

namespace relpos {

// A sum of numbers that came from T. Of float32, what rounding takes away is given back at the next addition.
template <typename T>
struct LongSum {
  float sum = 0.f, excess = 0.f;

  __device__ __forceinline__ void add(float x) {
    if constexpr (sizeof(T) == 2) {
      sum += x;
    } else {
      const float missing = x - excess, next = sum + missing;
      excess = (next - sum) - missing;
      sum = next;
    }
  }
  __device__ __forceinline__ void add(const LongSum& other) {
    excess += other.excess;
    add(other.sum);
  }
  __device__ __forceinline__ void scale(float factor) { sum *= factor, excess *= factor; }
};

}  // namespace relpos
