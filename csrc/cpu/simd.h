// simd.h - one vector of the compute type, at the width of the instruction set being compiled.
//
// Arithmetic is GCC/Clang vector extensions (portable to NEON and SSE2); intrinsics appear only where the
// extensions have no word: masked access and half-precision conversion.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace relpos {
namespace RELPOS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename C>
struct Simd {
  typedef C Vec __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / sizeof(C);
};
template <typename C>
using Vec = typename Simd<C>::Vec;
template <typename C>
constexpr int kLanes = Simd<C>::kLanes;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

// ---- scalar conversions
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  uint32_t u = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);  // rebias; inf, nan
  if (magnitude < 0x0400u) std::memcpy(&u, &subnormal, 4);
  u |= sign;
  float f = 0;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void narrow(double x, double* p) { *p = x; }
inline void narrow(double x, float* p) { *p = static_cast<float>(x); }
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, BFloat16* p) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void narrow(float x, Float16* p) {  // round to nearest even, by hand
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds past the largest finite value
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the float adder aligns and rounds
    float f;
    std::memcpy(&f, &magnitude, 4);
    f += 0.5f;
    std::memcpy(&h, &f, 4);
    h -= 0x3f000000u;
  } else {
    h = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  p->bits = static_cast<uint16_t>(h | sign);
}

// ---- whole vectors
inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const BFloat16* p) {
#if defined(__AVX512F__)  // GCC 12 converts by halves
  const auto words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  const auto words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const auto words = __builtin_convertvector(h, Words);
#endif
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Words>(words) << 16);
}
inline Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return reinterpret_cast<Vec<float>>(vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(p))));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }
inline void store(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)  // below 1.2e-38 it is zero
  const auto h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
  const Words u = reinterpret_cast<Words>(v);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Words is_nan = reinterpret_cast<Words>(v != v);
  const Halves h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Halves);
#endif
  std::memcpy(p, &h, sizeof h);
}
inline void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_f16(reinterpret_cast<float16_t*>(p), vcvt_f16_f32(reinterpret_cast<float32x4_t>(v)));
#else
  for (int i = 0; i < kLanes<float>; ++i) narrow(v[i], p + i);
#endif
}

// ---- the larger one, or b where that or a is no number
inline Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
inline Vec<double> max(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

// ---- the first n lanes; the others read as zero and are not written
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec<float> load_first(const float* p, int64_t n) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(first_lanes(n), p));
}
inline Vec<float> load_first(const BFloat16* p, int64_t n) {
  const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline Vec<float> load_first(const Float16* p, int64_t n) {
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)));
}
inline void store_first(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), reinterpret_cast<__m512>(v));
}
template <typename Half>
inline void store_first(Half* p, Vec<float> v, int64_t n) {
  Half all[kLanes<float>];
  store(all, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(all)));
}
#else
template <typename Half>
inline Vec<float> load_first(const Half* p, int64_t n) {
  Half all[kLanes<float>] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load(all);
}
template <typename Half>
inline void store_first(Half* p, Vec<float> v, int64_t n) {
  Half all[kLanes<float>];
  store(all, v);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
}
#if defined(__AVX2__)
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec<float> load_first(const float* p, int64_t n) {
  return reinterpret_cast<Vec<float>>(_mm256_maskload_ps(p, first_lanes(n)));
}
inline void store_first(float* p, Vec<float> v, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes(n), reinterpret_cast<__m256>(v));
}
#endif
#endif
inline Vec<double> load_first(const double* p, int64_t n) {
  double all[kLanes<double>] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load(all);
}
inline void store_first(double* p, Vec<double> v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// ---- sum of all lanes, in halves: always the same order
template <typename C>
inline C sum_lanes(Vec<C> v) {
  C s[kLanes<C>];
  store(s, v);
  for (int half = kLanes<C> / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}
#if defined(__AVX512F__)
template <>
inline float sum_lanes<float>(Vec<float> v) {
  const __m512 all = reinterpret_cast<__m512>(v);
  const __m256 high = _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(all), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

}  // namespace RELPOS_ISA
}  // namespace relpos
