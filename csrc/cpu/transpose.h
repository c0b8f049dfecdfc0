// transpose.h - rows become columns, for one instruction set: included by files compiled with RELPOS_ISA.
//
// Rows up to whole vectors of them are written as zero; what is read of a row ends with a whole vector, too.
#pragma once
#include "logits_kernels.h"
#include "simd.h"

namespace relpos {
namespace RELPOS_ISA {
namespace {

// to[c, r] = factor * from[r, c]
template <typename C>
void transpose(C* to, int64_t to_ld, const C* from, int64_t from_ld, int64_t rows, int64_t columns, C factor) {
  constexpr int64_t kSide = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kSide) {
    const int64_t full = rows - r0 < kSide ? rows - r0 : kSide;
    for (int64_t c = 0; c < columns; ++c) {
      C* at = to + c * to_ld + r0;
      for (int64_t r = 0; r < full; ++r) at[r] = factor * from[(r0 + r) * from_ld + c];
      for (int64_t r = r0 + full; r < padded<C>(rows); ++r) to[c * to_ld + r] = C{};
    }
  }
}

// Of two rows whose numbers differ in the bit BIT only: exchanges what lies in columns with and without that bit.
#if defined(__AVX512F__)
template <int BIT>
inline void exchange(Vec<float>& without, Vec<float>& with) {
  static constexpr auto order = [](bool high) {
    Words w{};
    for (uint32_t i = 0; i < 16; ++i)
      w[i] = ((i & BIT) != 0) == high ? i + (high ? 16 : 0) : (i ^ BIT) + (high ? 0 : 16);
    return w;
  };
  const __m512 a = reinterpret_cast<__m512>(without), b = reinterpret_cast<__m512>(with);
  without = reinterpret_cast<Vec<float>>(_mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(order(false)), b));
  with = reinterpret_cast<Vec<float>>(_mm512_permutex2var_ps(a, reinterpret_cast<__m512i>(order(true)), b));
}
#elif defined(__AVX2__)
template <int BIT>
inline void exchange(Vec<float>& without, Vec<float>& with) {
  const __m256 a = reinterpret_cast<__m256>(without), b = reinterpret_cast<__m256>(with);
  __m256 left, right;
  if constexpr (BIT == 1) {
    left = _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa);
    right = _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa);
  } else if constexpr (BIT == 2) {
    left = _mm256_shuffle_ps(a, b, 0x44);
    right = _mm256_shuffle_ps(a, b, 0xee);
  } else {
    left = _mm256_permute2f128_ps(a, b, 0x20);
    right = _mm256_permute2f128_ps(a, b, 0x31);
  }
  without = reinterpret_cast<Vec<float>>(left);
  with = reinterpret_cast<Vec<float>>(right);
}
#endif
#if defined(__AVX2__)
// All pairs of rows of a square, for this bit and all above.
template <int BIT, int SIDE>
inline void exchange_all(Vec<float> (&row)[SIDE]) {
#pragma GCC unroll 16
  for (int r = 0; r < SIDE; ++r)
    if (!(r & BIT)) exchange<BIT>(row[r], row[r | BIT]);
  if constexpr (2 * BIT < SIDE) exchange_all<2 * BIT>(row);
}

// to[c, r] = row r of columns c and on, by load(r, c): a square of whole vectors at a time, in registers.
template <typename Load>
inline void transpose_squares(float* to, int64_t to_ld, int64_t rows, int64_t columns, Load&& load_row) {
  constexpr int kSide = kLanes<float>;
  for (int64_t r0 = 0; r0 < padded<float>(rows); r0 += kSide)
    for (int64_t c0 = 0; c0 < columns; c0 += kSide) {
      Vec<float> row[kSide];
#pragma GCC unroll 16
      for (int r = 0; r < kSide; ++r) row[r] = r0 + r < rows ? load_row(r0 + r, c0) : Vec<float>{};
      exchange_all<1>(row);
#pragma GCC unroll 16
      for (int c = 0; c < kSide; ++c)
        if (c0 + c < columns) store(to + (c0 + c) * to_ld + r0, row[c]);
    }
}
template <>
void transpose(float* to, int64_t to_ld, const float* from, int64_t from_ld, int64_t rows, int64_t columns,
               float factor) {
  transpose_squares(to, to_ld, rows, columns,
                    [=](int64_t r, int64_t c) { return factor * load(from + r * from_ld + c); });
}
#endif

}  // namespace
}  // namespace RELPOS_ISA
}  // namespace relpos
