// attention_kernels.cpp - the inner loops of attention_kernels.h, compiled once per instruction set (RELPOS_ISA).
#include "attention_kernels.h"

#include "attention_lanes.h"
#include "simd.h"
#include "transpose.h"

namespace relpos {
namespace RELPOS_ISA {
namespace {

template <typename C>
void scale_lanes(C* block, const C* factor, int64_t rows, int64_t lanes) {
  for (int64_t r = 0; r < rows; ++r, block += kStrip)
    for (int64_t i = 0; i < lanes; i += kLanes<C>) store(block + i, load(block + i) * load(factor + i));
}

}  // namespace

extern const AttentionKernels<float> kAttentionFloat;
extern const AttentionKernels<double> kAttentionDouble;
const AttentionKernels<float> kAttentionFloat = {
    {softmax<float>, gradients<float>}, scale_lanes<float>, transpose<float>};
const AttentionKernels<double> kAttentionDouble = {
    {softmax<double>, gradients<double>}, scale_lanes<double>, transpose<double>};

}  // namespace RELPOS_ISA
}  // namespace relpos
