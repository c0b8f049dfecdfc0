// logits_kernels.cpp - the inner loops of logits_kernels.h, compiled once per instruction set (RELPOS_ISA).
#include "logits_kernels.h"

#include "gemm.h"
#include "simd.h"

namespace relpos {
namespace RELPOS_ISA {
namespace {

// Calls f(S{}) for the element type S that `dtype` names, among those that compute in C.
template <typename C, typename F>
inline void with_dtype(Dtype dtype, F&& f) {
  if constexpr (sizeof(C) == 8) {
    f(double{});
  } else {
    switch (dtype) {
      case Dtype::kBFloat16:
        return f(BFloat16{});
      case Dtype::kFloat16:
        return f(Float16{});
      default:
        return f(float{});
    }
  }
}

// ---- rows of any dtype, to and from the compute type
template <typename S>
void load_row(float* dst, const S* src, int64_t n) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(dst + i, load(src + i));
  if (i < n) store_first(dst + i, load_first(src + i, n - i), n - i);
}
template <typename S>
void load_row(double* dst, const S* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
}

template <typename S>
void store_row(S* dst, const float* src, int64_t n) {
  constexpr int L = kLanes<float>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(dst + i, load(src + i));
  if (i < n) store_first(dst + i, load_first(src + i, n - i), n - i);
}
template <typename S>
void store_row(S* dst, const double* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(src[i], dst + i);
}

template <typename C>
void load_any(C* dst, const void* src, Dtype dtype, int64_t n) {
  with_dtype<C>(dtype, [&](auto s) { load_row(dst, static_cast<const decltype(s)*>(src), n); });
}

template <typename C>
void store_any(void* dst, const C* src, Dtype dtype, int64_t n) {
  with_dtype<C>(dtype, [&](auto s) { store_row(static_cast<decltype(s)*>(dst), src, n); });
}

constexpr int64_t kLongRow = 512;  // keys of an image row; there is no need to be fast beyond

// ---- forward: one row of logits
template <typename S, typename C>
void add_bias(S* out, const S* logits, const C* bias, int64_t n) {
  constexpr int L = kLanes<C>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, load(logits + i) + load(bias + i));
  if (i < n) store_first(out + i, load_first(logits + i, n - i) + load(bias + i), n - i);
}

// Image rows that are no whole number of vectors: their bias is laid out in a small buffer first, whole vectors
// spilling into the next image row, which then overwrites them. The logits are streamed without a mask.
template <typename S, typename C>
void add_ragged_row(S* out, const S* logits, const C* outer, const C* inner, int64_t outer_keys, int64_t inner_keys) {
  constexpr int L = kLanes<C>;
  constexpr int64_t kBuffer = 1024;
  C bias[kBuffer + 2 * L];
  const int64_t at_once = kBuffer / inner_keys;
  for (int64_t o = 0; o < outer_keys; o += at_once) {
    const int64_t count = outer_keys - o < at_once ? outer_keys - o : at_once;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < inner_keys; j += L) store(bias + r * inner_keys + j, outer[o + r] + load(inner + j));
    add_bias(out + o * inner_keys, logits + o * inner_keys, bias, count * inner_keys);
  }
}

template <typename S, typename C>
void add_row_of(S* out, const S* logits, const C* outer, const C* inner, int64_t outer_keys, int64_t inner_keys) {
  constexpr int L = kLanes<C>;
  if (inner_keys % L && inner_keys <= kLongRow)
    return add_ragged_row(out, logits, outer, inner, outer_keys, inner_keys);
  for (int64_t o = 0; o < outer_keys; ++o, out += inner_keys, logits += inner_keys) {
    const C bias = outer[o];
    int64_t j = 0;
    for (; j + L <= inner_keys; j += L) store(out + j, load(logits + j) + (bias + load(inner + j)));
    if (j < inner_keys) {
      const int64_t n = inner_keys - j;
      store_first(out + j, load_first(logits + j, n) + (bias + load(inner + j)), n);
    }
  }
}

// ---- backward: one row of the gradient. A block of columns stays in registers while the image rows pass.
template <typename S, typename C, int VECS>
void sum_block(const S* grad, C* outer, C* inner, int64_t outer_keys, int64_t inner_keys, int64_t last, bool first) {
  constexpr int L = kLanes<C>;
  Vec<C> column[VECS] = {};
  for (int64_t o = 0; o < outer_keys; ++o, grad += inner_keys) {
    Vec<C> row{};
    for (int v = 0; v < VECS; ++v) {
      const Vec<C> g = v + 1 < VECS || last == L ? load(grad + v * L) : load_first(grad + v * L, last);
      column[v] += g;
      row += g;
    }
    outer[o] = (first ? C{} : outer[o]) + sum_lanes<C>(row);
  }
  for (int v = 0; v < VECS; ++v) store(inner + v * L, column[v]);
}

// Image rows too long for that: column sums stay in L1, a stretch of columns at a time. The sums of the stretches are
// short sums, so that their sum loses little.
template <typename S, typename C>
void sum_long_row(const S* grad, C* outer, C* inner, int64_t outer_keys, int64_t inner_keys) {
  constexpr int L = kLanes<C>;
  for (int64_t j0 = 0; j0 < inner_keys; j0 += kLongRow) {
    const int64_t width = inner_keys - j0 < kLongRow ? inner_keys - j0 : kLongRow;
    for (int64_t o = 0; o < outer_keys; ++o) {
      const S* g = grad + o * inner_keys + j0;
      Vec<C> row[4] = {};
      for (int64_t j = 0; j < width; j += L) {
        const Vec<C> x = j + L <= width ? load(g + j) : load_first(g + j, width - j);
        store(inner + j0 + j, o ? load(inner + j0 + j) + x : x);
        row[j / L % 4] += x;
      }
      outer[o] = (j0 ? outer[o] : C{}) + sum_lanes<C>((row[0] + row[1]) + (row[2] + row[3]));
    }
  }
}

template <typename S, typename C>
void sum_row_of(const S* grad, C* outer, C* inner, int64_t outer_keys, int64_t inner_keys) {
  constexpr int L = kLanes<C>;
  if (inner_keys > kLongRow) return sum_long_row(grad, outer, inner, outer_keys, inner_keys);
  for (int64_t j = 0; j < inner_keys; j += 4 * L) {
    const int64_t left = inner_keys - j, vectors = (left + L - 1) / L;
    const int64_t last = vectors > 4 ? L : left - (vectors - 1) * L;
    const bool first = j == 0;
    const S* g = grad + j;
    if (vectors >= 4) {
      sum_block<S, C, 4>(g, outer, inner + j, outer_keys, inner_keys, last, first);
    } else if (vectors == 3) {
      sum_block<S, C, 3>(g, outer, inner + j, outer_keys, inner_keys, last, first);
    } else if (vectors == 2) {
      sum_block<S, C, 2>(g, outer, inner + j, outer_keys, inner_keys, last, first);
    } else {
      sum_block<S, C, 1>(g, outer, inner + j, outer_keys, inner_keys, last, first);
    }
  }
}

template <typename C>
void add_row(void* out, const void* logits, Dtype dtype, const C* outer, const C* inner, int64_t outer_keys,
             int64_t inner_keys) {
  with_dtype<C>(dtype, [&](auto s) {
    using S = decltype(s);
    add_row_of(static_cast<S*>(out), static_cast<const S*>(logits), outer, inner, outer_keys, inner_keys);
  });
}

template <typename C>
void sum_row(const void* grad, Dtype dtype, C* outer, C* inner, int64_t outer_keys, int64_t inner_keys) {
  with_dtype<C>(
      dtype, [&](auto s) { sum_row_of(static_cast<const decltype(s)*>(grad), outer, inner, outer_keys, inner_keys); });
}

}  // namespace

extern const LogitsKernels<float> kLogitsFloat;
extern const LogitsKernels<double> kLogitsDouble;
const LogitsKernels<float> kLogitsFloat = {load_any<float>, store_any<float>, gemm<float>, add_row<float>,
                                           sum_row<float>};
const LogitsKernels<double> kLogitsDouble = {load_any<double>, store_any<double>, gemm<double>, add_row<double>,
                                             sum_row<double>};

}  // namespace RELPOS_ISA
}  // namespace relpos
