// logits_kernels.h - the vectorised inner loops, one table of functions per instruction set.
//
// logits_kernels.cpp is compiled once per instruction set; logits.cpp picks a table at run time and
// owns memory, tiles and threads. Nothing here allocates, and nothing here uses the standard library:
// an inline function of it, compiled with AVX-512 and merged by the linker, would end up in the
// baseline code too.
#pragma once
#include <cstdint>

namespace relpos {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Buffers of the compute type C are padded to whole vectors of the widest instruction set.
constexpr int kPadBytes = 64;
template <typename C>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t lanes = kPadBytes / sizeof(C);
  return (n + lanes - 1) / lanes * lanes;
}

// What a product multiplies: numbers, or pairs of bfloat16, neighbours in the axis that is summed, two products at
// once.
struct Pair {
  uint16_t first, second;
};
template <typename E>
struct Element {
  using Sum = E;
  static constexpr int kNumbers = 1;
};
template <>
struct Element<Pair> {
  using Sum = float;
  static constexpr int kNumbers = 2;
};
template <typename E>
using Sum = typename Element<E>::Sum;
template <typename E>
constexpr int kNumbers = Element<E>::kNumbers;
template <typename E>
constexpr int64_t elements(int64_t numbers) {
  return (numbers + kNumbers<E> - 1) / kNumbers<E>;
}

// c[m, n] (+)= sum_k a[m * row_stride + k * col_stride] * b[k, n]; k counts elements; n, b and c are padded.
template <typename E>
struct Gemm {
  int64_t m, n, k;
  const E* a;
  int64_t a_row_stride, a_col_stride;
  const E* b;
  int64_t ldb;
  Sum<E>* c;
  int64_t ldc;
  bool accumulate;
};

template <typename C>
struct LogitsKernels {
  void (*load)(C* dst, const void* src, Dtype dtype, int64_t n);   // dst = C(src)
  void (*store)(void* dst, const C* src, Dtype dtype, int64_t n);  // dst = rounded src
  void (*gemm)(const Gemm<C>&);
  // out[o, j] = logits[o, j] + (outer[o] + inner[j]) for one query row; inner is padded.
  void (*add_row)(void* out, const void* logits, Dtype dtype, const C* outer, const C* inner, int64_t outer_keys,
                  int64_t inner_keys);
  // outer[o] = sum_j grad[o, j], inner[j] = sum_o grad[o, j]; inner is padded and its padding is zeroed.
  void (*sum_row)(const void* grad, Dtype dtype, C* outer, C* inner, int64_t outer_keys, int64_t inner_keys);
};

// One pair per instruction set compiled in.
#define RELPOS_DECLARE_KERNELS(isa)                 \
  namespace isa {                                   \
  extern const LogitsKernels<float> kLogitsFloat;   \
  extern const LogitsKernels<double> kLogitsDouble; \
  }
RELPOS_DECLARE_KERNELS(baseline)
#ifdef RELPOS_HAVE_X86_ISAS
RELPOS_DECLARE_KERNELS(avx2)
RELPOS_DECLARE_KERNELS(avx512)
RELPOS_DECLARE_KERNELS(avx512_bf16)
#endif
#undef RELPOS_DECLARE_KERNELS

}  // namespace relpos
