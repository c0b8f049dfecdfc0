// pair_kernels.h - products of bfloat16, two at once, with sums in float32: for processors with AVX-512-BF16.
//
//   numbers [rows, ld]        along, [rows, ld / 2]          across, [rows / 2, ld]
//     a b c d                   (a b) (c d)                    (a e) (b f) (c g) (d h)
//     e f g h                   (e f) (g h)
//
// A product takes one operand along its rows and the other across them, so that both pair the axis that is summed.
// Rules for this file: logits_kernels.h.
#pragma once
#include <cstdint>

#include "attention_kernels.h"

namespace relpos {

struct PairKernels {
  BlockKernels<Pair> block;
  void (*gemm)(const Gemm<Pair>&);
  // to[c, r] = from[r, c]; rows up to whole vectors are written as zero.
  void (*transpose)(Pair* to, int64_t to_ld, const Pair* from, int64_t from_ld, int64_t rows, int64_t columns);
  // Two rows of bfloat16, n numbers each, paired in either way or, where the pointer is null, not. The second may be
  // null. What is beyond n, up to whole vectors, is taken for zero, and so is the second of these: in a product, it may
  // meet an infinity.
  void (*pack_rows)(Pair* along, Pair* across, int64_t ld, const void* first, const void* second, int64_t n);
};

#ifdef RELPOS_HAVE_X86_ISAS
namespace avx512_bf16 {
extern const PairKernels kPairs;
}
#endif

}  // namespace relpos
