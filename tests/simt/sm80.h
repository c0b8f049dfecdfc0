// sm80.h - csrc/cuda/tile/ptx.cuh emulated, the part that every architecture has: mma, ldmatrix, cp.async, conversions.
//
// Sums of mma are cut off as published of the tensor cores of sm_80 (SIMT_MMA=sm80, the default) or sm_90 (sm90); or
// products and sum are exact, and rounded once (exact).
#pragma once

#include "simt.h"

namespace simt {

// What a lane brings to mma, and what the last one to come leaves there: its part of the sum in d.
struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};
void multiply_float16(Slots& warp);
void multiply_bfloat16(Slots& warp);

inline constexpr Op kMmaFloat16{"mma", &Stats::mma, true, false, multiply_float16};
inline constexpr Op kMmaBfloat16{"mma", &Stats::mma, true, false, multiply_bfloat16};
inline constexpr Op kLdmatrix{"ldmatrix", &Stats::ldmatrix, true};

// 16 bytes on their way to shared memory.
struct Copy {
  void* dst;
  const void* src;  // null: zeros
  int group;
};

bool start_copy(const void* dst, const void* src, const Site& site);  // whether it is to arrive at once
void copy_commit();
bool next_copy(int groups_left, Copy& copy);  // one that must have arrived when that many groups are under way
void check_shared_row(const void* row, const char* what, const Site& site);
void count_conflicts(const void* const* rows, int matrices);

// d += a b, as all 32 lanes hold it.
inline void multiply(const Op& op, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  std::memcpy(d, gather(op, ~0u, mine, site).at<Fragments>(lane()).d, sizeof d);
}

inline void arrive(const Copy& copy) {
  *static_cast<uint4*>(copy.dst) = copy.src ? *static_cast<const uint4*>(copy.src) : uint4{};
}

inline float to_float(__half x) { return __half2float(x); }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
float half_of(uint32_t pair, int which) {
  return to_float(__builtin_bit_cast(T, static_cast<uint16_t>(pair >> (16 * which))));
}

// Matrix j lies in the 8 rows whose addresses lanes 8j .. 8j + 7 bring. Lane l receives elements
// (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of each, or of each transposed.
template <int MATRICES, bool TRANS>
void load_matrices(uint32_t (&r)[MATRICES], const void* row, const Site& site) {
  using Row = const uint16_t*;
  if (lane() < 8 * MATRICES) check_shared_row(row, "ldmatrix", site);
  const Gathered rows = gather(kLdmatrix, ~0u, static_cast<Row>(row), site);
  if (lane() == 0) count_conflicts(&rows.at<const void*>(0), MATRICES);
  const int l = lane(), major = l / 4, minor = l % 4 * 2;
  for (int j = 0; j < MATRICES; ++j) {
    const auto element = [&](int i, int k) -> uint32_t { return rows.at<Row>(8 * j + i)[k]; };
    r[j] = TRANS ? element(minor, major) | element(minor + 1, major) << 16
                 : *reinterpret_cast<const uint32_t*>(rows.at<Row>(8 * j + major) + minor);
  }
}

}  // namespace simt

namespace relpos {

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  simt::Site site = simt::Site::current()) {
  simt::multiply(std::is_same_v<T, __half> ? simt::kMmaFloat16 : simt::kMmaBfloat16, d, a, b, site);
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.f : y;
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, simt::Site at = simt::Site::current()) {
  simt::load_matrices<2, false>(r, row, at);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Site at = simt::Site::current()) {
  simt::load_matrices<4, false>(r, row, at);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, simt::Site at = simt::Site::current()) {
  simt::load_matrices<2, true>(r, row, at);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, simt::Site at = simt::Site::current()) {
  simt::load_matrices<4, true>(r, row, at);
}

inline void cp_async_16(void* dst, const void* src, bool pred, simt::Site site = simt::Site::current()) {
  if (simt::start_copy(dst, pred ? src : nullptr, site)) simt::arrive({dst, pred ? src : nullptr, 0});
}
inline void cp_async_commit() { simt::copy_commit(); }
template <int N>
void cp_async_wait() {
  for (simt::Copy copy; simt::next_copy(N, copy);) simt::arrive(copy);
}

}  // namespace relpos
