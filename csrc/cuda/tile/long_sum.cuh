// long_sum.cuh - sums of so many numbers that float32 must take care of what rounding takes away.
#pragma once
#include <type_traits>

namespace relpos {

// What rounding takes away is given back at the next addition.
struct LongSum {
  float sum = 0.f, missing = 0.f;

  __device__ __forceinline__ void operator+=(float x) { settle(missing + x); }
  __device__ __forceinline__ void operator+=(const LongSum& other) {
    missing += other.missing;
    *this += other.sum;
  }
  __device__ __forceinline__ void operator*=(float factor) { sum *= factor, missing *= factor; }
  __device__ __forceinline__ operator float() const { return sum; }

  // += x, of which what was missing is a part.
  __device__ __forceinline__ void settle(float x) {
    const float next = sum + x;
    missing = x - (next - sum);
    sum = next;
  }
};

// A sum of numbers that came from T.
template <typename T>
using Sum = std::conditional_t<sizeof(T) == 4, LongSum, float>;

}  // namespace relpos
