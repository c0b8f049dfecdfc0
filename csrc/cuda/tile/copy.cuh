// copy.cuh - elements of any dtype in registers as float, 16 bytes at a time.
#pragma once
#include "ptx.cuh"

namespace relpos {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename S>
__device__ __forceinline__ S from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two neighbours, aligned as a pair.
__device__ __forceinline__ void set_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = {x, y}; }
__device__ __forceinline__ void set_pair(__half* to, float x, float y) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(x, y);
}
__device__ __forceinline__ void set_pair(__nv_bfloat16* to, float x, float y) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(x, y);
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 two;
    memcpy(static_cast<void*>(&two), &word, sizeof two);
    return __half22float2(two);
  } else {  // the upper half of a float: of two, one needs no shift
    const uint32_t bits[2] = {word << 16, word & 0xffff0000u};
    float2 two;
    memcpy(&two, bits, sizeof two);
    return two;
  }
}

template <typename S>
constexpr int kVector = 16 / sizeof(S);  // elements of a 16-byte vector

template <typename S>
__device__ __forceinline__ void unpack(uint4 v, float (&x)[kVector<S>]) {  // by value: memory is read as a vector
  uint32_t words[4];
  memcpy(words, &v, sizeof v);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(S) == 4) {
      memcpy(x + i, words + i, sizeof(float));
    } else {
      const float2 two = unpack_pair<S>(words[i]);
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  }
}

template <typename S>
__device__ __forceinline__ uint4 pack(const float (&x)[kVector<S>]) {
  S e[kVector<S>];
#pragma unroll
  for (int i = 0; i < kVector<S>; ++i) e[i] = from_float<S>(x[i]);
  uint4 v;
  memcpy(&v, e, sizeof v);
  return v;
}

// Up to four elements, as float; those past `left` read as zero. p is aligned if D % 4 == 0.
template <typename T>
__device__ __forceinline__ void load4(const T* p, int left, bool aligned, float (&x)[4]) {
  if (aligned) {
    T e[4];
    if constexpr (sizeof(T) == 4) {
      const float4 v = *reinterpret_cast<const float4*>(p);
      memcpy(static_cast<void*>(e), &v, sizeof v);
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      memcpy(static_cast<void*>(e), &v, sizeof v);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = to_float(e[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < left ? to_float(p[i]) : 0.f;
  }
}

}  // namespace relpos
