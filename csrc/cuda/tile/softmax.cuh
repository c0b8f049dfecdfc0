// softmax.cuh - the online softmax of a warp's queries: results so far, and the reference that they are relative to.
//
// The largest score of a query need not be exact: it is renewed only when it has grown by kMayGrow powers of two.
#pragma once
#include "factors.cuh"
#include "long_sum.cuh"

namespace relpos {

constexpr float kMayGrow = 8.f;
constexpr float kNoneYet = -1e30f;  // below every score but -inf, from which it can be subtracted

// STRIPS of 16 queries, PART blocks of 8 keys at a time.
template <typename T, int D, int STRIPS, int PART, bool ONE_LINE>
struct OnlineSoftmax {
  Sum<T> out[STRIPS][D / 8][4] = {}, sum[STRIPS][2] = {};
  float reference[STRIPS][2];  // a power of two

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int s = 0; s < STRIPS; ++s) reference[s][0] = reference[s][1] = kNoneYet;
  }

  // Scores, and what their lines add; leaves weights in their place, which are to be added to `out`.
  __device__ __forceinline__ void weigh(const AttentionFwdParams& p, float (&score)[STRIPS][PART][4],
                                        const float (&line)[STRIPS][PART][2]) {
    renew_reference(score, line, p.to_powers, [] {});
    take_powers(p, score, line);
  }
  __device__ __forceinline__ void take_powers(const AttentionFwdParams& p, float (&score)[STRIPS][PART][4],
                                              const float (&line)[STRIPS][PART][2]) {
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int j = 0; j < PART; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          score[s][j][e] = exp2_approx(fmaf(score[s][j][e], p.to_powers, line[s][j][e / 2] - reference[s][e / 2]));
          sum[s][e / 2] += score[s][j][e];
        }
  }

  // settle(): before `out` is touched.
  template <typename F>
  __device__ __forceinline__ void renew_reference(const float (&score)[STRIPS][PART][4],
                                                  const float (&line)[STRIPS][PART][2], float to_powers, F&& settle) {
    float most[STRIPS][2];
    bool grown = false;
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto of_block = [&](int j) {
          const float x = fmaxf(score[s][j][2 * half], score[s][j][2 * half + 1]);
          return ONE_LINE ? x : fmaf(x, to_powers, line[s][j][half]);
        };
        float x = of_block(0);
#pragma unroll
        for (int j = 1; j < PART; ++j) x = fmaxf(x, of_block(j));
        most[s][half] = ONE_LINE ? fmaf(x, to_powers, line[s][0][half]) : x;
        grown |= most[s][half] - reference[s][half] > kMayGrow;
      }
    grown = __any_sync(~0u, grown);
    settle();
    if (!grown) return;
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = fmaxf(most[s][half], reference[s][half]);
        for (int d = 1; d < 4; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
        const float shrink = exp2_approx(reference[s][half] - x);
        reference[s][half] = x;
        sum[s][half] *= shrink;
#pragma unroll
        for (int d = 0; d < D / 8; ++d) out[s][d][2 * half] *= shrink, out[s][d][2 * half + 1] *= shrink;
      }
  }

  // Strip s; `rows` is a tile of the block's queries, of which the warp takes its own. below(m): what the bias of
  // query m was kept relative to, in powers of two.
  template <typename F>
  __device__ __forceinline__ void store(const AttentionFwdParams& p, const BlockPlace& block, int s, int first,
                                        const Tile<T, D>& rows, F&& below) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[s][half];
      for (int d = 1; d < 4; d *= 2) total += __shfl_xor_sync(~0u, total, d);
      const int m = first + lane / 4 + half * 8;
      if (p.lse && lane % 4 == 0 && m < block.count)
        p.lse[block.group * p.shape.M() + block.first + m] = (reference[s][half] + below(m) + log2f(total)) * kLn2;
      // In half precision, an error of 2^-24 more does not matter, but a division is 20 instructions.
      const float part = 1.f / total;
      const auto share = [&](float x) { return sizeof(T) == 2 ? x * part : x / total; };
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        set_pair(rows.at(m, d * 8 + lane % 4 * 2), share(out[s][d][2 * half]), share(out[s][d][2 * half + 1]));
    }
    __syncwarp();
    store_queries(rows, first, p, block, p.out);
  }
};

}  // namespace relpos
