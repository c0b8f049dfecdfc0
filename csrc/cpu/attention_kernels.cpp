// attention_kernels.cpp - the inner loops of attention_kernels.h, compiled once per instruction set (RELPOS_ISA).
//
//   softmax    y = scale * s + outer + inner, m' = max(m, y), p = e^(y - m'), sum' = sum * e^(m - m') + sum of p
//   gradients  p = e^(y - lse), ds = p * (dp - delta), d_outer += sums over columns, d_inner += over image rows
//
//                 queries, one per lane --->
//   keys      o   j   | s s s s s s s s |    row o of outer, row j of inner, added lane by lane
//   image row 0   0   | s s s s s s s s |
//     "       0   1   | s s s s s s s s |    a few vectors of lanes at a time: their outer factor and their
//     "       1   0   | s s s s s s s s |    running values stay in registers while the keys pass
//
//   memory     blocks of scores fit the L2 cache of a core and are read twice per call; inner stays in L1.
//   order      keys one after another, sums of a block before they meet the sums so far.
#include "attention_kernels.h"

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

// Where x is known not to be positive, but for the rounding of a large lse.
template <typename C>
inline Vec<C> exp_of_negative(Vec<C> x) {
  return exp(x > C{0} ? Vec<C>{} : x);
}

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

// Blocks come by value: what is stored cannot be part of them, so they are not read again after every store.
template <typename C, int VECS>
void softmax_lanes(const ScoreBlock<C> b, int64_t lane, C* largest, C* sum, C* shrink) {
  constexpr int L = kLanes<C>;
  Vec<C> most[VECS], before[VECS], total[VECS] = {};
  for (int v = 0; v < VECS; ++v) most[v] = before[v] = load(largest + lane + v * L);
  for (int64_t n = 0; n < b.prefix; ++n)
    for (int v = 0; v < VECS; ++v) {
      C* at = b.scores + n * kStrip + lane + v * L;
      const Vec<C> y = load(at) * b.scale;
      store(at, y);
      most[v] = max(y, most[v]);
    }
  for_each_image_row(b, [&](int64_t n, int64_t o, int64_t j, int64_t count) {
    Vec<C> outer[VECS];
    for (int v = 0; v < VECS; ++v) outer[v] = load(b.outer + o * kStrip + lane + v * L);
    for (int64_t i = 0; i < count; ++i)
      for (int v = 0; v < VECS; ++v) {
        C* at = b.scores + (n + i) * kStrip + lane + v * L;
        const Vec<C> y = load(at) * b.scale + (outer[v] + load(b.inner + (j + i) * kStrip + lane + v * L));
        store(at, y);
        most[v] = max(y, most[v]);
      }
  });
  for (int64_t n = 0; n < b.keys;) {
    const int64_t end = short_sum(n, b.keys);
    Vec<C> part[VECS] = {};
    for (; n < end; ++n)
      for (int v = 0; v < VECS; ++v) {
        C* at = b.scores + n * kStrip + lane + v * L;
        const Vec<C> p = exp(load(at) - most[v]);
        store(at, p);
        part[v] += p;
      }
    for (int v = 0; v < VECS; ++v) total[v] += part[v];
  }
  for (int v = 0; v < VECS; ++v) {
    const Vec<C> factor = exp(before[v] - most[v]);
    store(shrink + lane + v * L, factor);
    store(largest + lane + v * L, most[v]);
    store(sum + lane + v * L, load(sum + lane + v * L) * factor + total[v]);
  }
}

// Where a block is all keys, its own sums are better than lse and delta, in which p and d are rounded otherwise: what
// should cancel does. Leaves e^(score - lse), and per lane the factor that makes it a probability, and delta.
template <typename C, int VECS>
void normalise(const ScoreBlock<C>& b, int64_t lane, const C* d, Vec<C>* less, Vec<C>* mean) {
  constexpr int L = kLanes<C>;
  Vec<C> total[VECS] = {}, weighted[VECS] = {};
  const auto add_run = [&](int64_t n, int64_t count, const Vec<C>* outer, const C* inner) {
    for (int64_t i = 0; i < count;) {
      const int64_t end = short_sum(i, count);
      Vec<C> part[VECS] = {}, part_weighted[VECS] = {};
      for (; i < end; ++i)
        for (int v = 0; v < VECS; ++v) {
          const int64_t at = (n + i) * kStrip + lane + v * L;
          const Vec<C> bias = inner ? outer[v] + load(inner + i * kStrip + lane + v * L) : outer[v];
          const Vec<C> p = exp_of_negative<C>(load(b.scores + at) * b.scale + bias);
          store(b.scores + at, p);
          part[v] += p;
          part_weighted[v] += p * load(d + at);
        }
      for (int v = 0; v < VECS; ++v) total[v] += part[v], weighted[v] += part_weighted[v];
    }
  };
  Vec<C> outer[VECS];
  for (int v = 0; v < VECS; ++v) outer[v] = -less[v];
  add_run(0, b.prefix, outer, nullptr);
  for_each_image_row(b, [&](int64_t n, int64_t o, int64_t j, int64_t count) {
    for (int v = 0; v < VECS; ++v) outer[v] = load(b.outer + o * kStrip + lane + v * L) - less[v];
    add_run(n, count, outer, b.inner + j * kStrip);
  });
  for (int v = 0; v < VECS; ++v) less[v] = C{1} / total[v], mean[v] = weighted[v] * less[v];
}

template <typename C, int VECS, bool WHOLE>
void gradient_lanes(const ScoreBlock<C> b, int64_t lane, C* d, const C* lse, const C* delta, C* d_outer, C* d_inner) {
  constexpr int L = kLanes<C>;
  Vec<C> less[VECS], mean[VECS];
  for (int v = 0; v < VECS; ++v) less[v] = load(lse + lane + v * L), mean[v] = load(delta + lane + v * L);
  if constexpr (WHOLE) normalise<C, VECS>(b, lane, d, less, mean);
  // bias - lse comes first: it is the smaller number where p is large, and loses less when scale * s is added.
  const auto step = [&](int64_t at, int v, Vec<C> bias) {
    const Vec<C> p = WHOLE ? load(b.scores + at) * less[v] : exp_of_negative<C>(load(b.scores + at) * b.scale + bias);
    const Vec<C> ds = p * (load(d + at) - mean[v]);
    store(b.scores + at, p);
    store(d + at, ds);
    return ds;
  };
  for (int64_t n = 0; n < b.prefix; ++n)
    for (int v = 0; v < VECS; ++v) step(n * kStrip + lane + v * L, v, -less[v]);
  for_each_image_row(b, [&](int64_t n, int64_t o, int64_t j, int64_t count) {
    Vec<C> outer[VECS], sums[VECS] = {};
    for (int v = 0; v < VECS; ++v) outer[v] = load(b.outer + o * kStrip + lane + v * L) - less[v];
    for (int64_t i = 0; i < count;) {
      const int64_t end = short_sum(i, count);
      Vec<C> part[VECS] = {};
      for (; i < end; ++i)
        for (int v = 0; v < VECS; ++v) {
          const int64_t column = (j + i) * kStrip + lane + v * L;
          const Vec<C> ds = step((n + i) * kStrip + lane + v * L, v, outer[v] + load(b.inner + column));
          part[v] += ds;
          store(d_inner + column, load(d_inner + column) + ds);
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

template <typename C>
void softmax(const ScoreBlock<C>& b, C* largest, C* sum, C* shrink) {
  for_each_chunk<C>(b.lanes, [&](auto vecs, int64_t lane) {
    softmax_lanes<C, decltype(vecs)::value>(b, lane, largest, sum, shrink);
  });
}

template <typename C>
void gradients(const ScoreBlock<C>& b, C* d, const C* lse, const C* delta, C* d_outer, C* d_inner) {
  for_each_chunk<C>(b.lanes, [&](auto vecs, int64_t lane) {
    constexpr int VECS = decltype(vecs)::value;
    b.whole ? gradient_lanes<C, VECS, true>(b, lane, d, lse, delta, d_outer, d_inner)
            : gradient_lanes<C, VECS, false>(b, lane, d, lse, delta, d_outer, d_inner);
  });
}

template <typename C>
void scale_lanes(C* block, const C* factor, int64_t rows, int64_t lanes) {
  for (int64_t r = 0; r < rows; ++r, block += kStrip)
    for (int64_t i = 0; i < lanes; i += kLanes<C>) store(block + i, load(block + i) * load(factor + i));
}

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

// A square of whole vectors at a time, in registers.
template <>
void transpose(float* to, int64_t to_ld, const float* from, int64_t from_ld, int64_t rows, int64_t columns,
               float factor) {
  constexpr int kSide = kLanes<float>;
  for (int64_t r0 = 0; r0 < padded<float>(rows); r0 += kSide)
    for (int64_t c0 = 0; c0 < columns; c0 += kSide) {
      Vec<float> row[kSide];
#pragma GCC unroll 16
      for (int r = 0; r < kSide; ++r)
        row[r] = r0 + r < rows ? factor * load(from + (r0 + r) * from_ld + c0) : Vec<float>{};
      exchange_all<1>(row);
#pragma GCC unroll 16
      for (int c = 0; c < kSide; ++c)
        if (c0 + c < columns) store(to + (c0 + c) * to_ld + r0, row[c]);
    }
}
#endif

}  // namespace

extern const AttentionKernels<float> kAttentionFloat;
extern const AttentionKernels<double> kAttentionDouble;
const AttentionKernels<float> kAttentionFloat = {softmax<float>, gradients<float>, scale_lanes<float>,
                                                 transpose<float>};
const AttentionKernels<double> kAttentionDouble = {softmax<double>, gradients<double>, scale_lanes<double>,
                                                   transpose<double>};

}  // namespace RELPOS_ISA
}  // namespace relpos
