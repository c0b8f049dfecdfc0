// attention_kernels.h - the vectorised inner loops of the attention, one table of functions per instruction set.
//
// Everything is transposed: a block of scores is [keys, kStrip], one query per lane. The bias of a key is then the
// sum of two vectors, a softmax needs no sum across lanes, and every matrix product reads whole vectors.
// Rules for this file: logits_kernels.h.
#pragma once
#include <cstdint>

#include "logits_kernels.h"

namespace relpos {

constexpr int64_t kStrip = 64;  // queries side by side; leading dimension of all that is transposed

// The scores of some neighbouring keys: `prefix` class tokens, then grid keys from `first` on.
template <typename C>
struct ScoreBlock {
  C* scores;                    // [keys, kStrip]: work memory
  const C *outer, *inner;       // [image rows, kStrip], [columns, kStrip]: factors
  int64_t prefix, first, keys;  // keys counts the prefix, too
  int64_t columns;              // keys of an image row
  int64_t queries;              // of the strip; lanes up to whole vectors hold numbers, too
  C scale;
  bool whole;  // there are no other keys
};

// What products multiply (E) is written as they take it: numbers where they are, or pairs (pair_kernels.h).
template <typename E, typename C = Sum<E>>
struct BlockKernels {
  // Scores are those of the product, times scale, + outer + inner; weights = e^(score - largest so far), across; sum =
  // sum * shrink + sum of weights. shrink is e^(largest before - largest now): what earlier results are to be
  // multiplied with.
  void (*softmax)(const Gemm<E>& scores, const ScoreBlock<C>&, E* weights, C* largest, C* sum, C* shrink);
  // Scores as above; weights = e^(score - lse), d_scores = weights * (d - delta), along, and sums of these: d_outer
  // over columns, d_inner over image rows. Of a whole block, lse and delta are not read. Numbers may go where they come
  // from.
  void (*gradients)(const Gemm<E>& scores, const ScoreBlock<C>&, const C* d, const C* lse, const C* delta, C* d_outer,
                    C* d_inner, E* weights, E* d_scores);
};

template <typename C>
struct AttentionKernels {
  BlockKernels<C> block;
  void (*scale_lanes)(C* block, const C* factor, int64_t rows, int64_t lanes);  // block is [rows, kStrip]
  // to[c, r] = factor * from[r, c]; rows up to whole vectors are written as zero.
  void (*transpose)(C* to, int64_t to_ld, const C* from, int64_t from_ld, int64_t rows, int64_t columns, C factor);
};

#define RELPOS_DECLARE_KERNELS(isa)                       \
  namespace isa {                                         \
  extern const AttentionKernels<float> kAttentionFloat;   \
  extern const AttentionKernels<double> kAttentionDouble; \
  }
RELPOS_DECLARE_KERNELS(baseline)
#ifdef RELPOS_HAVE_X86_ISAS
RELPOS_DECLARE_KERNELS(avx2)
RELPOS_DECLARE_KERNELS(avx512)
RELPOS_DECLARE_KERNELS(avx512_bf16)
#endif
#undef RELPOS_DECLARE_KERNELS

}  // namespace relpos
