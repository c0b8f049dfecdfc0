// split.cuh - operands of products of float32: three of bfloat16, the largest parts first.
//
// Six products, an error below 2^-25 of each. They are summed by themselves and then added: tensor cores cut sums off
// instead of rounding them, which over many steps is more than float32 allows.
//
//   x = part 0 + part 1 + part 2        x y = 0 0 + (0 1 + 1 0) + (0 2 + 1 1 + 2 0)
#pragma once
#include "long_sum.cuh"
#include "operands.cuh"

namespace relpos {

constexpr int kSplitParts = 3;  // of a number

__device__ __forceinline__ void split(float x, float y, uint32_t (&pairs)[kSplitParts]) {
#pragma unroll
  for (int n = 0; n < kSplitParts; ++n) {
    set_pair(reinterpret_cast<__nv_bfloat16*>(pairs + n), x, y);
    const float2 two = unpack_pair<__nv_bfloat16>(pairs[n]);
    x -= two.x, y -= two.y;
  }
}

// [rows, part, D]: what is read by many warps is split once.
template <int D>
struct SplitTile {
  using Element = float;
  using Part = Tile<__nv_bfloat16, D, split_ld(D)>;
  static constexpr int kD = D, kLd = split_ld(D);
  __nv_bfloat16* data;

  __device__ __forceinline__ Part part(int n) const { return {data + n * D}; }
  // Elements d .. d + 3 of a row.
  __device__ __forceinline__ void set(int row, int d, float4 x) const {
    uint32_t left[kSplitParts], right[kSplitParts];
    split(x.x, x.y, left), split(x.z, x.w, right);
#pragma unroll
    for (int n = 0; n < kSplitParts; ++n) *reinterpret_cast<uint2*>(part(n).at(row, d)) = {left[n], right[n]};
  }
};

// Pair i of an operand.
template <typename Operand>
__device__ __forceinline__ void split(float x, float y, Operand (&parts)[kSplitParts], int i) {
  uint32_t pairs[kSplitParts];
  split(x, y, pairs);
#pragma unroll
  for (int n = 0; n < kSplitParts; ++n) parts[n].pairs[i] = pairs[n];
}

template <>
struct OperandA<float> {
  OperandA<__nv_bfloat16> part[kSplitParts];

  template <int D>
  __device__ __forceinline__ void load(const SplitTile<D>& from, int row, int step) {
#pragma unroll
    for (int n = 0; n < kSplitParts; ++n) part[n].load(from.part(n), row, step);
  }
  __device__ __forceinline__ void set(const float (&left)[4], const float (&right)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      split(left[2 * i], left[2 * i + 1], part, i);
      split(right[2 * i], right[2 * i + 1], part, 2 + i);
    }
  }
  template <int STEPS, int D>
  __device__ __forceinline__ void load_spread(const SplitTile<D>& from, int row, int d, int step) {
#pragma unroll
    for (int n = 0; n < kSplitParts; ++n) part[n].template load_spread<STEPS>(from.part(n), row, d, step);
  }
};

template <>
struct OperandB<float> {
  OperandB<__nv_bfloat16> part[kSplitParts];

  __device__ __forceinline__ void set_row(const uint32_t (&row)[4]) {
    float x[4];
    memcpy(x, row, sizeof x);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(x[2 * i], x[2 * i + 1], part, i);
  }
};

template <int D>
__device__ __forceinline__ void load_transposed(OperandB<float> (&b)[2], const SplitTile<D>& from, int row, int step,
                                                int next = 8) {
#pragma unroll
  for (int n = 0; n < kSplitParts; ++n) {
    OperandB<__nv_bfloat16> two[2];
    load_transposed(two, from.part(n), row, step, next);
    b[0].part[n] = two[0], b[1].part[n] = two[1];
  }
}

template <int D>
__device__ __forceinline__ void load_straight(OperandB<float> (&b)[2], const SplitTile<D>& from, int row, int block,
                                              int next = 8) {
#pragma unroll
  for (int n = 0; n < kSplitParts; ++n) {
    OperandB<__nv_bfloat16> two[2];
    load_straight(two, from.part(n), row, block, next);
    b[0].part[n] = two[0], b[1].part[n] = two[1];
  }
}
// Of what is read once.
template <int D>
__device__ __forceinline__ void load_straight(OperandB<float> (&b)[2], const Tile<float, D>& from, int row, int block) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* upper = from.at(row + lane % 4 * 2 + i % 2 * 8, (block + i / 2) * 8 + lane / 4);
    split(*upper, upper[Tile<float, D>::kLd], b[i / 2].part, i % 2);
  }
}

template <bool SWAPPED>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const OperandA<float>& a, const OperandB<float>& b) {
#pragma unroll
  for (int order = kSplitParts - 1; order >= 0; --order)  // the small ones first
#pragma unroll
    for (int n = 0; n <= order; ++n) {
      const int of_a = SWAPPED ? order - n : n;
      multiply(sum, a.part[of_a], b.part[order - of_a]);
    }
}
template <bool SWAPPED = false>
__device__ __forceinline__ void multiply(float (&acc)[4], const OperandA<float>& a, const OperandB<float>& b) {
  float sum[4] = {};
  multiply_parts<SWAPPED>(sum, a, b);
#pragma unroll
  for (int e = 0; e < 4; ++e) acc[e] += sum[e];
}
__device__ __forceinline__ void multiply(LongSum (&acc)[4], const OperandA<float>& a, const OperandB<float>& b) {
  float sum[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = acc[e].missing;
  multiply_parts<false>(sum, a, b);
#pragma unroll
  for (int e = 0; e < 4; ++e) acc[e].settle(sum[e]);
}

}  // namespace relpos
