// sm80.cpp - what sm80.h declares: products, rows of ldmatrix, asynchronous copies.
//
// It throws simt::Error, with the kernel's source line, for a row of ldmatrix or cp.async that is misaligned or outside
// shared memory.
#include "sm80.h"

#include <algorithm>

#include "machine.h"

namespace simt {
namespace {

// ---- products: d += a b on 16 x 16, 16 x 8 and 16 x 8 elements

constexpr int kDepth = 16;
constexpr int kLeastOfFloat = -126;  // exponent

// Bits to values, without a branch, so that the compiler converts many at once.
struct Float16 {
  static constexpr int kLeastExponent = -14;
  static float value(uint16_t x) {
    const uint32_t magnitude = uint32_t{x & 0x7fffu} << 13, sign = uint32_t{x & 0x8000u} << 16;
    const auto finite = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
    return __builtin_bit_cast(float, sign | finite | -uint32_t{magnitude >= 0x0f800000} & 0x7f800000);
  }
};
struct Bfloat16 {
  static constexpr int kLeastExponent = kLeastOfFloat;
  static float value(uint16_t x) { return __builtin_bit_cast(float, uint32_t{x} << 16); }
};
// Of eight columns.
using Row = double __attribute__((vector_size(64)));
using RowBits = int64_t __attribute__((vector_size(64)));
using RowExponents = int32_t __attribute__((vector_size(32)));

// d += a b for d [16, 8].
#ifdef __x86_64__
__attribute__((target_clones("default", "arch=haswell")))
#endif
void add_product(const double* a, const double* b, double* d) {
  const auto at = [](const double* p) { return *reinterpret_cast<const Row*>(p); };
  for (int i = 0; i < 16; i += 4) {  // four sums under way at once
    Row sum[4];
    for (int r = 0; r < 4; ++r) sum[r] = at(d + 8 * (i + r));
    for (int k = 0; k < kDepth; ++k)
      for (int r = 0; r < 4; ++r) sum[r] += a[(i + r) * kDepth + k] * at(b + 8 * k);
    for (int r = 0; r < 4; ++r) std::memcpy(d + 8 * (i + r), &sum[r], sizeof sum[r]);
  }
}

// Exponents of a [16, 16] or b [16, 8], that of a subnormal number the least there is, that of zero none.
struct Exponents {
  alignas(64) int32_t of[16 * 16];

  Exponents(const double* x, int count, int least) {
    for (int i = 0; i < count; ++i) {
      const int biased = static_cast<int>(__builtin_bit_cast(uint64_t, x[i]) >> 52 & 0x7ff);
      of[i] = biased == 0 ? -10000 : std::max(biased - 1023, least);
    }
  }
};

// As add_product, cut off as tensor cores do. Where a result is not finite, neither is the exact one.
#ifdef __x86_64__
__attribute__((target_clones("default", "arch=haswell")))
#endif
void add_truncated(const double* a, const Exponents& of_a, const double* b, const Exponents& of_b, const Adder& adder,
                   double* d) {
  const auto row = [](const double* p) { return *reinterpret_cast<const Row*>(p); };
  const auto exponents = [](const int32_t* p) { return *reinterpret_cast<const RowExponents*>(p); };
  const auto larger = [](RowExponents x, RowExponents y) { return x > y ? x : y; };
  const auto power_of_2 = [](RowExponents x) {
    return __builtin_bit_cast(Row, __builtin_convertvector(x + 1023, RowBits) << 52);
  };
  const auto truncated = [](Row x) { return __builtin_convertvector(__builtin_convertvector(x, RowExponents), Row); };
  const int at_once = kDepth / adder.parts;
  for (int i = 0; i < 16; ++i) {
    Row sum = row(d + 8 * i);
    for (int k0 = 0; k0 < kDepth; k0 += at_once) {
      const RowBits of_sum = (__builtin_bit_cast(RowBits, sum) >> 52 & 0x7ff) - 1023;
      RowExponents largest = larger(__builtin_convertvector(of_sum, RowExponents), RowExponents{} + kLeastOfFloat);
      for (int k = k0; k < k0 + at_once; ++k)
        largest = larger(largest, of_a.of[i * kDepth + k] + exponents(of_b.of + 8 * k));
      const Row scale = power_of_2(adder.bits - largest);
      sum = truncated(sum * scale);
      for (int k = k0; k < k0 + at_once; ++k) sum += truncated(a[i * kDepth + k] * scale * row(b + 8 * k));
      sum *= power_of_2(largest - adder.bits);
      sum = __builtin_bit_cast(Row, __builtin_bit_cast(RowBits, sum) & -(int64_t{1} << 29));  // 24 bits remain
    }
    std::memcpy(d + 8 * i, &sum, sizeof sum);
  }
}

// Lane 4 i + j holds word j of row i of each 8 x 4 words of a and of d, of column i of each 4 x 8 words of b: two
// elements each.
template <typename T>
void multiply_as(Slots& warp) {
  uint16_t a_bits[16 * kDepth], b_bits[kDepth * 8];
  for (int l = 0; l < warpSize; ++l) {
    const auto& lane = warp.at<Fragments>(l);
    for (int h = 0; h < 2; ++h) {
      const int k = (l % 4 + h * 4) * 2;
      std::memcpy(&a_bits[l / 4 * kDepth + k], &lane.a[2 * h], sizeof(uint32_t));
      std::memcpy(&a_bits[(l / 4 + 8) * kDepth + k], &lane.a[2 * h + 1], sizeof(uint32_t));
      for (int i = 0; i < 2; ++i) b_bits[(k + i) * 8 + l / 4] = static_cast<uint16_t>(lane.b[h] >> 16 * i);
    }
  }
  alignas(64) double a[16 * kDepth], b[kDepth * 8], d[16 * 8], exact[16 * 8];
  for (int i = 0; i < 16 * kDepth; ++i) a[i] = T::value(a_bits[i]);
  for (int i = 0; i < 8 * kDepth; ++i) b[i] = T::value(b_bits[i]);
  const auto place = [](int l, int r) { return (l / 4 + r / 2 * 8) * 8 + l % 4 * 2 + r % 2; };
  for (int l = 0; l < warpSize; ++l)
    for (int r = 0; r < 4; ++r) d[place(l, r)] = warp.at<Fragments>(l).d[r];
  std::memcpy(exact, d, sizeof d);
  add_product(a, b, exact);
  if (adder.parts > 0)
    add_truncated(a, {a, 16 * kDepth, T::kLeastExponent}, b, {b, 8 * kDepth, T::kLeastExponent}, adder, d);
  for (int l = 0; l < warpSize; ++l)
    for (int r = 0; r < 4; ++r) {
      const double sum = exact[place(l, r)];
      const bool truncates = adder.parts > 0 && std::isfinite(sum);
      warp.at<Fragments>(l).d[r] = static_cast<float>(truncates ? d[place(l, r)] : sum);
    }
}

}  // namespace

void multiply_float16(Slots& warp) { multiply_as<Float16>(warp); }
void multiply_bfloat16(Slots& warp) { multiply_as<Bfloat16>(warp); }

void check_shared_row(const void* row, const char* what, const Site& site) {
  const ptrdiff_t at = static_cast<const unsigned char*>(row) - shared_begin(), size = shared_bytes();
  if (at < 0 || at + 16 > size) fail(site, "%s: byte %td is outside the %td bytes of shared memory", what, at, size);
  if (at % 16 != 0) fail(site, "%s: byte %td of shared memory is not 16-byte aligned", what, at);
}

void count_conflicts(const void* const* rows, int matrices) {  // 8 rows, 8 columns of 16 bytes
  for (int j = 0; j < matrices; ++j) {
    unsigned columns = 0;
    for (int i = 8 * j; i < 8 * j + 8; ++i) columns |= 1u << (reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8);
    counts.bank_conflicts += 8 - __builtin_popcount(columns);
  }
}

bool start_copy(const void* dst, const void* src, const Site& site) {
  const Unobserved books;
  check_shared_row(dst, "cp.async", site);
  if (reinterpret_cast<uintptr_t>(src) % 16 != 0) fail(site, "cp.async: the source is not 16-byte aligned");
  ++counts.cp_async;
  if (happens_at_once()) return true;
  self->copies.push_back({const_cast<void*>(dst), src, self->groups});
  return false;
}

void copy_commit() { ++self->groups; }

bool next_copy(int groups_left, Copy& copy) {
  const Unobserved books;
  std::deque<Copy>& copies = self->copies;
  if (copies.empty() || copies.front().group >= self->groups - groups_left) return false;
  copy = copies.front();
  copies.pop_front();
  return true;
}

}  // namespace simt
