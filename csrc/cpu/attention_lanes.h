// attention_lanes.h - softmax over a block of scores, and its gradient, for one instruction set: included by files
// compiled with RELPOS_ISA.
//
//   softmax    y = scale * s + outer + inner, m' = max(m, y), p = e^(y - m'), sum' = sum * e^(m - m') + sum of p
//   gradients  p = e^(y - lse), or e^(y - m) / sum where all keys are there, ds = p * (dp - delta)
//              d_outer += sums of ds over columns, d_inner += over image rows
//
//                 queries, one per lane --->
//   keys      o   j   | s s s s s s s s |    row o of outer, row j of inner, added lane by lane
//   image row 0   0   | s s s s s s s s |
//     "       0   1   | s s s s s s s s |    a few vectors of lanes at a time: their outer factor and their
//     "       1   0   | s s s s s s s s |    running values stay in registers while the keys pass
//
//   memory     blocks of scores fit the L2 cache of a core, inner the L1. The softmax finds scores where the product
//              has its sums, in registers, and reads them once more; the gradients read them once or twice. What
//              products will multiply (E) is written once, as they want it.
//   order      keys one after another, sums of a block before they meet the sums so far.
#pragma once
#include "attention_kernels.h"
#include "gemm.h"
#include "simd.h"

namespace relpos {
namespace RELPOS_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChunk = 4;  // vectors of lanes at a time, where there are 32 registers
#else
constexpr int kChunk = 2;
#endif

template <int N>
struct Int {
  static constexpr int value = N;
};

// e^x for x <= 0 or not far above: relative error below 1.1 * 2^-24. Below -87 it stays at 1.6e-38, near enough to
// nothing to vanish beside the 1 that every softmax holds. Not-a-numbers stay.
inline Vec<float> exp(Vec<float> x) {
  x = max(Vec<float>{} - 87.f, x);
  const Vec<float> shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // x / log 2, rounded to an integer in the low bits
  const Vec<float> n = shifted - 0x1.8p23f;
  const Vec<float> r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // log 2 in two parts, the first product exact
  Vec<float> y = r * 0x1.6a2438p-10f + 0x1.1239e4p-7f;              // minimax on +-log(2) / 2
  y = y * r + 0x1.5558f2p-5f;
  y = y * r + 0x1.555492p-3f;
  y = y * r + 0x1.fffffcp-2f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Words>(y) + (reinterpret_cast<Words>(shifted) << 23));
}
inline Vec<double> exp(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// As exact as products of E can tell. 2^x, x = n + r: a polynomial in r, 2.9e-6 off at most and 1 at 0. Of an x that
// is -inf, r is no number, and scalef gives 0 all the same.
template <typename E>
inline Vec<Sum<E>> exp_for(Vec<Sum<E>> x) {
#if defined(__AVX512BF16__)
  if constexpr (kNumbers<E> == 2) {
    x *= 0x1.715476p+0f;
    const Vec<float> n = reinterpret_cast<Vec<float>>(
        _mm512_maskz_roundscale_ps(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
    const Vec<float> r = x - n;
    Vec<float> y = r * 0x1.3a02ccp-7f + 0x1.c9fc46p-5f;
    y = y * r + 0x1.ec0378p-3f;
    y = y * r + 0x1.62e12cp-1f;
    y = y * r + 1.f;
    return reinterpret_cast<Vec<float>>(
        _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(n)));
  } else
#endif
    return exp(x);
}

// Where x is known not to be positive, but for the rounding of a large lse.
template <typename E, typename C = Sum<E>>
inline Vec<C> exp_of_negative(Vec<C> x) {
  return exp_for<E>(x > C{0} ? Vec<C>{} : x);
}

// ---- numbers as operands of products (pair_kernels.h): of kNumbers<E> keys, across; of one key, along: those of its
// first `valid` lanes
inline void store_across(float* at, const Vec<float> (&keys)[1]) { store(at, keys[0]); }
inline void store_across(double* at, const Vec<double> (&keys)[1]) { store(at, keys[0]); }
inline void store_along(float* row, int64_t lane, Vec<float> numbers, int64_t) { store(row + lane, numbers); }
inline void store_along(double* row, int64_t lane, Vec<double> numbers, int64_t) { store(row + lane, numbers); }
#if defined(__AVX512BF16__)
// Low half of each word from the first half of `both`, high half from the second.
inline __m512i interleave(__m512i both) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
}
inline __m512i round_two(Vec<float> first, Vec<float> second) {
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}
inline void store_across(Pair* at, const Vec<float> (&keys)[2]) {
  _mm512_storeu_si512(at, interleave(round_two(keys[0], keys[1])));
}
inline void store_along(Pair* row, int64_t lane, Vec<float> numbers, int64_t valid) {
  const __mmask16 some = valid < kLanes<float> ? first_lanes(valid) : 0xffff;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + lane / 2),
                      reinterpret_cast<__m256i>(_mm512_maskz_cvtneps_pbh(some, reinterpret_cast<__m512>(numbers))));
}
#endif

// Calls f(key of the block, image row, first column, columns) for every image row, whole or in part.
template <typename C, typename F>
inline void for_each_image_row(const ScoreBlock<C>& b, F&& f) {
  int64_t o = b.first / b.columns, j = b.first % b.columns;
  for (int64_t n = b.prefix; n < b.keys; ++o, j = 0) {
    const int64_t left = b.keys - n, count = b.columns - j < left ? b.columns - j : left;
    f(n, o, j, count);
    n += count;
  }
}

// Sums of many keys are sums of short sums: they lose less.
inline int64_t short_sum(int64_t n, int64_t keys) { return n + 16 < keys ? n + 16 : keys; }

// Sums of the product <q, k> become scores, and the largest of every lane is kept. Asked for keys one after another,
// for some lanes after others.
template <typename C>
class Biased {
 public:
  Biased(const ScoreBlock<C>& block, C* most) : b_(block), most_(most) {}

  template <typename E, int ROWS, int VECS>
  void operator()(const Gemm<E>& g, int64_t n0, int64_t lane, Vec<C> (&sums)[ROWS][VECS]) {
    C* at = b_.scores + n0 * kStrip + lane;
    if (g.accumulate) for_each<ROWS, VECS>([&](int r, int v) { sums[r][v] += load(at + r * kStrip + v * kLanes<C>); });
    if (n0 == 0) inner_ = b_.inner + b_.first % b_.columns * kStrip, outer_ = b_.outer + b_.first / b_.columns * kStrip;
    n0 < b_.prefix ? finish<true>(b_.prefix - n0, at, lane, sums) : finish<false>(0, at, lane, sums);
  }

 private:
  template <bool PREFIX, int ROWS, int VECS>
  void finish(int64_t prefix, C* at, int64_t lane, const Vec<C> (&sums)[ROWS][VECS]) {
    constexpr int L = kLanes<C>;
    const int64_t row = b_.columns * kStrip;
    const C scale = b_.scale;
    const C *inner = inner_ + lane, *outer = outer_ + lane, *const end = b_.inner + row + lane;
    Vec<C> largest[VECS];
    for (int v = 0; v < VECS; ++v) largest[v] = load(most_ + lane + v * L);
    for_each<ROWS, VECS>([&](int r, int v) {
      const bool biased = !PREFIX || r >= prefix;
      const Vec<C> bias = biased ? load(outer + v * L) + load(inner + v * L) : Vec<C>{}, y = sums[r][v] * scale + bias;
      store(at + r * kStrip + v * L, y);
      largest[v] = max(y, largest[v]);
      if (v < VECS - 1 || !biased) return;
      inner += kStrip;
      const bool line_ends = inner == end;
      inner -= line_ends ? row : 0;
      outer += line_ends ? kStrip : 0;
    });
    for (int v = 0; v < VECS; ++v) store(most_ + lane + v * L, largest[v]);
    inner_ = inner - lane, outer_ = outer - lane;
  }

  const ScoreBlock<C> b_;
  C* most_;
  const C *inner_ = nullptr, *outer_ = nullptr;  // of the next key
};

// Blocks come by value: what is stored cannot be part of them, so they are not read again after every store.
template <typename E, int VECS, typename C = Sum<E>>
void softmax_lanes(const ScoreBlock<C> b, int64_t lane, const C* new_largest, E* weights, C* largest, C* sum,
                   C* shrink) {
  constexpr int L = kLanes<C>;
  Vec<C> most[VECS], before[VECS], total[VECS] = {};
  for (int v = 0; v < VECS; ++v) most[v] = load(new_largest + lane + v * L), before[v] = load(largest + lane + v * L);
  constexpr int kKeys = kNumbers<E>;
  const auto add = [&](int64_t n, auto count, Vec<C>* to) {
    for (int v = 0; v < VECS; ++v) {
      Vec<C> p[kKeys] = {};
      for (int i = 0; i < decltype(count)::value; ++i) {
        p[i] = exp_for<E>(load(b.scores + (n + i) * kStrip + lane + v * L) - most[v]);
        to[v] += p[i];
      }
      store_across(weights + n / kKeys * kStrip + lane + v * L, p);
    }
  };
  const int64_t whole = b.keys / kKeys * kKeys;
  for (int64_t n = 0; n < whole;) {
    const int64_t end = short_sum(n, whole);
    Vec<C> part[VECS] = {};
    for (; n < end; n += kKeys) add(n, Int<kKeys>{}, part);
    for (int v = 0; v < VECS; ++v) total[v] += part[v];
  }
  if (whole < b.keys) add(whole, Int<1>{}, total);
  for (int v = 0; v < VECS; ++v) {
    const Vec<C> factor = exp(before[v] - most[v]);
    store(shrink + lane + v * L, factor);
    store(largest + lane + v * L, most[v]);
    store(sum + lane + v * L, load(sum + lane + v * L) * factor + total[v]);
  }
}

// Where a block is all keys, its own sums are better than lse and delta, in which p and d are rounded otherwise: what
// should cancel does. Scores become e^(score - most), and per lane there is the factor that makes them probabilities,
// and delta.
template <typename E, int VECS, typename C = Sum<E>>
void normalise(const ScoreBlock<C>& b, int64_t lane, const C* d, const C* most, Vec<C>* factor, Vec<C>* mean) {
  constexpr int L = kLanes<C>;
  Vec<C> total[VECS] = {}, weighted[VECS] = {}, less[VECS];
  for (int v = 0; v < VECS; ++v) less[v] = load(most + lane + v * L);
  for (int64_t n = 0; n < b.keys;) {
    const int64_t end = short_sum(n, b.keys);
    Vec<C> part[VECS] = {}, part_weighted[VECS] = {};
    for (; n < end; ++n)
      for (int v = 0; v < VECS; ++v) {
        const int64_t at = n * kStrip + lane + v * L;
        const Vec<C> p = exp_for<E>(load(b.scores + at) - less[v]);
        store(b.scores + at, p);
        part[v] += p;
        part_weighted[v] += p * load(d + at);
      }
    for (int v = 0; v < VECS; ++v) total[v] += part[v], weighted[v] += part_weighted[v];
  }
  for (int v = 0; v < VECS; ++v) factor[v] = C{1} / total[v], mean[v] = weighted[v] / total[v];
}

// WHOLE: of `lse` there is only what is common to all keys, the largest score.
template <typename E, int VECS, bool WHOLE, typename C = Sum<E>>
void gradient_lanes(const ScoreBlock<C> b, int64_t lane, const C* d, const C* lse, const C* delta, C* d_outer,
                    C* d_inner, E* weights, E* d_scores) {
  constexpr int L = kLanes<C>;
  Vec<C> less[VECS], mean[VECS];
  if constexpr (WHOLE)
    normalise<E, VECS>(b, lane, d, lse, less, mean);
  else
    for (int v = 0; v < VECS; ++v) less[v] = load(lse + lane + v * L), mean[v] = load(delta + lane + v * L);
  const auto step = [&](int64_t n, int v) {
    const int64_t column = lane + v * L, at = n * kStrip + column, row = n * kStrip / kNumbers<E>,
                  valid = b.queries - column;
    const Vec<C> p = WHOLE ? load(b.scores + at) * less[v] : exp_of_negative<E>(load(b.scores + at) - less[v]);
    const Vec<C> ds = p * (load(d + at) - mean[v]);
    store_along(weights + row, column, p, valid);
    store_along(d_scores + row, column, ds, valid);
    return ds;
  };
  for (int64_t n = 0; n < b.prefix; ++n)
    for (int v = 0; v < VECS; ++v) step(n, v);
  for_each_image_row(b, [&](int64_t n, int64_t o, int64_t j, int64_t count) {
    Vec<C> sums[VECS] = {};
    for (int64_t i = 0; i < count;) {
      const int64_t end = short_sum(i, count);
      Vec<C> part[VECS] = {};
      for (; i < end; ++i)
        for (int v = 0; v < VECS; ++v) {
          C* at = d_inner + (j + i) * kStrip + lane + v * L;
          const Vec<C> ds = step(n + i, v);
          part[v] += ds;
          store(at, load(at) + ds);
        }
      for (int v = 0; v < VECS; ++v) sums[v] += part[v];
    }
    for (int v = 0; v < VECS; ++v) {
      C* at = d_outer + o * kStrip + lane + v * L;
      store(at, load(at) + sums[v]);
    }
  });
}

// Calls f(number of vectors, first lane), a chunk of vectors at a time.
template <typename C, int VECS = kChunk, typename F>
inline void for_each_chunk(int64_t lanes, F&& f, int64_t lane = 0) {
  for (; lane + VECS * kLanes<C> <= lanes; lane += VECS * kLanes<C>) f(Int<VECS>{}, lane);
  if constexpr (VECS > 1) for_each_chunk<C, VECS / 2>(lanes, f, lane);
}

template <typename E, typename C = Sum<E>>
void softmax(const Gemm<E>& scores, const ScoreBlock<C>& b, E* weights, C* largest, C* sum, C* shrink) {
  C most[kStrip];
  std::memcpy(most, largest, sizeof most);
  gemm(scores, Biased<C>(b, most));
  for_each_chunk<C>(padded<C>(b.queries), [&](auto vecs, int64_t lane) {
    softmax_lanes<E, decltype(vecs)::value>(b, lane, most, weights, largest, sum, shrink);
  });
}

template <typename E, typename C = Sum<E>>
void gradients(const Gemm<E>& scores, const ScoreBlock<C>& b, const C* d, const C* lse, const C* delta, C* d_outer,
               C* d_inner, E* weights, E* d_scores) {
  C most[kStrip];
  for (C& x : most) x = static_cast<C>(-__builtin_inf());
  gemm(scores, Biased<C>(b, most));  // the very numbers of the forward, so that what was summed there is divided here
  for_each_chunk<C>(padded<C>(b.queries), [&](auto vecs, int64_t lane) {
    constexpr int VECS = decltype(vecs)::value;
    b.whole ? gradient_lanes<E, VECS, true>(b, lane, d, most, delta, d_outer, d_inner, weights, d_scores)
            : gradient_lanes<E, VECS, false>(b, lane, d, lse, delta, d_outer, d_inner, weights, d_scores);
  });
}

}  // namespace
}  // namespace RELPOS_ISA
}  // namespace relpos
