// sm80.cpp - what sm80.h declares: products, rows of ldmatrix, asynchronous copies.
//
// It throws simt::Error, with the kernel's source line, for a row of ldmatrix or cp.async that is misaligned or outside
// shared memory.
#include "sm80.h"

#include "machine.h"

namespace simt {
namespace {

// The word's element number i of two, or of one.
struct Float16 {
  static constexpr int kPerWord = 2;
  static double element(uint32_t word, int i) { return half_of<__half>(word, i); }
};
struct Bfloat16 {
  static constexpr int kPerWord = 2;
  static double element(uint32_t word, int i) { return half_of<__nv_bfloat16>(word, i); }
};
struct Tf32 {
  static constexpr int kPerWord = 1;
  static double element(uint32_t word, int) { return __builtin_bit_cast(float, word& kTf32Bits); }
};

// d += a b on 16 x K, K x 8 and 16 x 8. A quarter of a, a half of b or d is an 8 x 8 words tile, as a word of 16 or
// 32 bits counts: lane l holds word l % 4 of row l / 4 of each (of b: of column l / 4); d has two columns per word.
template <typename T>
void multiply_as(Slot* slots) {
  constexpr int kWords = 4, kK = 2 * kWords * T::kPerWord;
  double a[16][kK], b[kK][8];
  for (int l = 0; l < warpSize; ++l) {
    const auto& lane = *reinterpret_cast<const Fragments*>(slots[l].bytes);
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < T::kPerWord; ++i) {
        const int k = (h * kWords + l % 4) * T::kPerWord + i;
        for (int v = 0; v < 2; ++v) a[l / 4 + 8 * v][k] = T::element(lane.a[2 * h + v], i);
        b[k][l / 4] = T::element(lane.b[h], i);
      }
  }
  for (int row = 0; row < 16; ++row) {
    double sum[8];
    const auto d = [&](int column) -> float& {
      auto& lane = *reinterpret_cast<Fragments*>(slots[row % 8 * 4 + column / 2].bytes);
      return lane.d[row / 8 * 2 + column % 2];
    };
    for (int j = 0; j < 8; ++j) sum[j] = d(j);
    for (int k = 0; k < kK; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += a[row][k] * b[k][j];
    for (int j = 0; j < 8; ++j) d(j) = static_cast<float>(sum[j]);
  }
}

}  // namespace

void multiply_float16(Slot* slots) { multiply_as<Float16>(slots); }
void multiply_bfloat16(Slot* slots) { multiply_as<Bfloat16>(slots); }
void multiply_tf32(Slot* slots) { multiply_as<Tf32>(slots); }

void check_shared_row(const void* row, const char* what, const Site& site) {
  const ptrdiff_t at = static_cast<const unsigned char*>(row) - shared_begin(), size = shared_bytes();
  if (at < 0 || at + 16 > size) fail(site, "%s: byte %td is outside the %td bytes of shared memory", what, at, size);
  if (at % 16 != 0) fail(site, "%s: byte %td of shared memory is not 16-byte aligned", what, at);
}

void count_conflicts(const Gathered& rows, int matrices) {  // 8 rows, 8 columns of 16 bytes
  for (int j = 0; j < matrices; ++j) {
    unsigned columns = 0;
    for (int i = 8 * j; i < 8 * j + 8; ++i)
      columns |= 1u << (reinterpret_cast<uintptr_t>(rows.at<const void*>(i)) / 16 % 8);
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
