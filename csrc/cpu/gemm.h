// gemm.h - the matrix product of the CPU kernels, for one instruction set: included by files compiled with RELPOS_ISA.
//
// ROWS x VECS vectors of the product stay in registers while k runs. It meets what c held only at the end: a sum of a
// few products loses less than the same products added to a long sum one by one.
#pragma once
#include "logits_kernels.h"
#include "simd.h"

namespace relpos {
namespace RELPOS_ISA {

inline Words load(const Pair* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

namespace {

#if defined(__AVX512F__)
constexpr int kGemmRows = 6, kGemmVectors = 4, kShortSum = 128;
#elif defined(__AVX2__)
constexpr int kGemmRows = 6, kGemmVectors = 2, kShortSum = 128;
#elif defined(__aarch64__)
constexpr int kGemmRows = 4, kGemmVectors = 4, kShortSum = 128;  // up to four products a cycle take four cycles each
#else
constexpr int kGemmRows = 4, kGemmVectors = 2, kShortSum = 32;  // products are rounded, too
#endif

inline Vec<float> multiply_add(Vec<float> sum, float a, Vec<float> b) { return sum + a * b; }
inline Vec<double> multiply_add(Vec<double> sum, double a, Vec<double> b) { return sum + a * b; }
#if defined(__AVX512BF16__)
inline Vec<float> multiply_add(Vec<float> sum, Pair a, Words b) {
  int32_t both;
  std::memcpy(&both, &a, sizeof both);
  return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                       reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)),
                                                       reinterpret_cast<__m512bh>(b)));
}
#endif

// Calls f(row, vector) for all sums of a block.
template <int ROWS, int VECS, typename F>
inline void for_each(F&& f) {
#pragma GCC unroll 8  // else the sums take a way through memory
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v) f(r, v);
}

// What becomes of sums: they are stored, or added to what is there.
struct Stored {
  template <typename E, int ROWS, int VECS, typename C = Sum<E>>
  void operator()(const Gemm<E>& g, int64_t m0, int64_t n0, const Vec<C> (&sums)[ROWS][VECS]) const {
    C* c = g.c + m0 * g.ldc + n0;
    const int64_t ldc = g.ldc;
    const auto at = [=](int r, int v) { return c + r * ldc + v * kLanes<C>; };
    if (g.accumulate)
      for_each<ROWS, VECS>([&](int r, int v) { store(at(r, v), load(at(r, v)) + sums[r][v]); });
    else
      for_each<ROWS, VECS>([&](int r, int v) { store(at(r, v), sums[r][v]); });
  }
};

// A function of its own, that k may have all registers.
template <typename E, int ROWS, int VECS, typename Finish>
__attribute__((noinline)) void gemm_block(const Gemm<E>& g, int64_t m0, int64_t n0, Finish&& finish) {
  using C = Sum<E>;
  constexpr int L = kLanes<C>;
  const E* a = g.a + m0 * g.a_row_stride;
  const E* b = g.b + n0;
  Vec<C> acc[ROWS][VECS] = {};
  for (int64_t k = 0; k < g.k; ++k, a += g.a_col_stride, b += g.ldb) {
    decltype(load(b)) row[VECS];
    for (int v = 0; v < VECS; ++v) row[v] = load(b + v * L);
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECS; ++v) acc[r][v] = multiply_add(acc[r][v], a[r * g.a_row_stride], row[v]);
  }
  finish(g, m0, n0, acc);
}

template <int ROWS, int VECS, typename E, typename Finish>
void gemm_rows(const Gemm<E>& g, int64_t m0, int64_t n0, Finish&& finish) {
  if (g.m - m0 >= ROWS) {
    gemm_block<E, ROWS, VECS>(g, m0, n0, finish);
  } else if constexpr (ROWS > 1) {
    gemm_rows<ROWS - 1, VECS>(g, m0, n0, finish);
  }
}

template <int VECS, typename E, typename Finish>
void gemm_columns(const Gemm<E>& g, int64_t n0, Finish&& finish) {
  constexpr int L = kLanes<Sum<E>>;
  for (; n0 + VECS * L <= g.n; n0 += VECS * L)
    for (int64_t m0 = 0; m0 < g.m; m0 += kGemmRows) gemm_rows<kGemmRows, VECS>(g, m0, n0, finish);
  if constexpr (VECS > 1) gemm_columns<VECS / 2>(g, n0, finish);
}

// A few k at a time, for the same reason; the last sums are finished as the caller wants.
template <typename E, typename Finish>
void gemm(const Gemm<E>& g, Finish&& finish) {
  constexpr int64_t kAtOnce = kShortSum / kNumbers<E>;
  Gemm<E> part = g;
  for (int64_t k = 0; k == 0 || k < g.k; k += kAtOnce) {
    part.k = g.k - k < kAtOnce ? g.k - k : kAtOnce;
    part.a = g.a + k * g.a_col_stride;
    part.b = g.b + k * g.ldb;
    part.accumulate = g.accumulate || k != 0;
    if (k + kAtOnce < g.k)
      gemm_columns<kGemmVectors>(part, 0, Stored{});
    else
      gemm_columns<kGemmVectors>(part, 0, finish);
  }
}
template <typename E>
void gemm(const Gemm<E>& g) {
  gemm(g, Stored{});
}

}  // namespace
}  // namespace RELPOS_ISA
}  // namespace relpos
