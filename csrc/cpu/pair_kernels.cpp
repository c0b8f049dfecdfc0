// pair_kernels.cpp - the inner loops of pair_kernels.h.
#include "pair_kernels.h"

#include "gemm.h"
#include "simd.h"

namespace relpos {
namespace RELPOS_ISA {
namespace {

// Lanes of two vectors in turn: low half of each word from `first`, high half from `second`.
inline __m512i interleave(__m512bh both) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), reinterpret_cast<__m512i>(both));
}

void pack(Pair* along, Pair* across, const float* from, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2) {
    const bool odd = r + 1 == rows;
    for (int64_t c = 0; c < columns; c += kLanes<float>) {
      const __mmask16 valid = columns - c < kLanes<float> ? first_lanes(columns - c) : 0xffff;
      const __m512 first = _mm512_maskz_loadu_ps(valid, from + r * ld + c);
      const __m512 second = _mm512_maskz_loadu_ps(odd ? 0 : valid, from + (r + 1) * ld + c);
      const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
      if (across) _mm512_storeu_si512(across + r / 2 * ld + c, interleave(both));
      if (!along) continue;
      const __m512i rounded = reinterpret_cast<__m512i>(both);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(along + (r * ld + c) / 2), _mm512_castsi512_si256(rounded));
      if (!odd)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(along + ((r + 1) * ld + c) / 2),
                            _mm512_extracti64x4_epi64(rounded, 1));
    }
  }
}

}  // namespace

extern const PairKernels kPairs;
const PairKernels kPairs = {gemm<Pair>, pack};

}  // namespace RELPOS_ISA
}  // namespace relpos
