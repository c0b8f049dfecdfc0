// pair_kernels.cpp - the inner loops of pair_kernels.h.
#include "pair_kernels.h"

#include "attention_lanes.h"
#include "gemm.h"
#include "simd.h"
#include "transpose.h"

namespace relpos {
namespace RELPOS_ISA {
namespace {

void transpose_pairs(Pair* to, int64_t to_ld, const Pair* from, int64_t from_ld, int64_t rows, int64_t columns) {
  static_assert(sizeof(Pair) == sizeof(float));
  transpose_squares(reinterpret_cast<float*>(to), to_ld, rows, columns,
                    [=](int64_t r, int64_t c) { return load(reinterpret_cast<const float*>(from + r * from_ld + c)); });
}

void pack_rows(Pair* along, Pair* across, int64_t ld, const void* first, const void* second, int64_t n) {
  const auto *a = static_cast<const uint16_t*>(first), *b = static_cast<const uint16_t*>(second);
  for (int64_t c = 0; c < n; c += kLanes<float>) {
    const __mmask16 valid = n - c < kLanes<float> ? first_lanes(n - c) : 0xffff;
    const __m256i low = _mm256_maskz_loadu_epi16(valid, a + c),
                  high = b ? _mm256_maskz_loadu_epi16(valid, b + c) : __m256i{};
    if (across) _mm512_storeu_si512(across + c, interleave(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
    if (!along) continue;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(along + c / 2), low);
    if (b) _mm256_storeu_si256(reinterpret_cast<__m256i*>(along + (ld + c) / 2), high);
  }
}

}  // namespace

extern const PairKernels kPairs;
const PairKernels kPairs = {{softmax<Pair>, gradients<Pair>}, gemm<Pair>, transpose_pairs, pack_rows};

}  // namespace RELPOS_ISA
}  // namespace relpos
