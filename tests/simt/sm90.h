// sm90.h - csrc/cuda/tile/ptx.cuh emulated, what sm80.h lacks: named barriers, stmatrix, mbarrier, TMA, wgmma.
//
//   SIMT_ASYNC   late                                                        early
//   TMA          writes when no thread can run                               at once
//   wgmma        reads shared memory in wgmma_wait; d is NaN until then      at once
//
// Shared addresses, by which copies are swizzled, begin at 1024 if the kernel asked for that alignment; at 1040 if not.
// Whatever touches the kernel's memory is in this file, where a race detector sees it; the books are in sm90.cpp.
// Not modelled: the rounding inside wgmma (here: exact products and sum, one rounding).
#pragma once

#include <functional>

#include "../../csrc/cuda/tensor_map.h"
#include "sm80.h"

#define RELPOS_DYNAMIC_SHARED_1024(name) unsigned char* const name = ::simt::shared_memory(1024)

namespace simt {

inline constexpr Op kStmatrix{"stmatrix", &Stats::stmatrix, true};
inline constexpr Op kWgmma{"wgmma", &Stats::wgmma, true};
inline constexpr Op kWgmmaSync{"wgmma_fence or wgmma_wait", &Stats::warpgroup_syncs, true};
inline constexpr Op kSetmaxnreg{"setmaxnreg", &Stats::warpgroup_syncs, true};

uint32_t shared_address(const void* p);
void* shared_pointer(uint32_t address, const Site& site);
void check_shared(const void* p, int bytes, int alignment, const char* what, const Site& site);

void named_barrier(int id, int threads, bool waits, const Site& site);
void warpgroup_op(const Op& op, const Site& site);

void mbarrier_init(const void* bar, int count, const Site& site);
void mbarrier_arrive(const void* bar, int bytes, const Site& site);
void mbarrier_wait(const void* bar, int parity, const Site& site);
void show_mbarriers();  // that this thread has initialised, to TMA
void start_copy(const void* bar, int bytes, const std::function<void()>& copy, const Site& site);

void fence_proxies();
void enter_async_proxy();
void leave_async_proxy();
void wgmma_fence(const Site& site);
void wgmma_commit();
void wgmma_wait(int groups_left, const Site& site);
bool start_product(float* d, int registers, std::function<void(float*)>& product, const Site& site);  // whether at once

inline uint32_t swizzled(uint32_t address, relpos::Swizzle s) {
  const uint32_t chunks = relpos::span_of(s) / 16;
  return address ^ (address >> 7 & (chunks - 1)) << 4;
}

// The word of an mbarrier: mbarrier_init writes it and all others read it, atomically, so that a use which nothing
// orders after the initialisation is a race.
inline constexpr uint64_t kInitialised = 0x72656972726162;
inline void check_mbarrier(const uint64_t* bar, const Site& site) {
  check_shared(bar, 8, 8, "mbarrier", site);
  if (__atomic_load_n(bar, __ATOMIC_RELAXED) != kInitialised) fail(site, "this mbarrier is not initialised");
}

// A box on its way to shared memory.
template <typename Element>
void copy_box(const relpos::TensorMap& map, uint32_t dst, const int (&at)[5], const Site& site) {
  const int elements = map.box_bytes() / map.element_bytes;
  for (int i = 0; i < elements; ++i) {
    int64_t offset = 0;
    bool inside = true;
    for (int axis = 0, rest = i; axis < map.rank; rest /= map.box[axis++]) {
      const int64_t x = int64_t{at[axis]} + rest % map.box[axis];
      inside &= 0 <= x && x < map.size[axis];
      offset += x * (axis == 0 ? map.element_bytes : map.stride[axis]);
    }
    const uint32_t to = swizzled(dst + static_cast<uint32_t>(i * map.element_bytes), map.swizzle);
    const auto* const from = static_cast<const unsigned char*>(map.base) + (inside ? offset : 0);
    *static_cast<Element*>(shared_pointer(to, site)) = inside ? *reinterpret_cast<const Element*>(from) : Element{};
  }
}

// An operand of wgmma in shared memory, as the bits of its descriptor say.
struct Matrix {
  uint64_t descriptor;
  bool mn_major;

  relpos::Swizzle swizzle() const { return static_cast<relpos::Swizzle>(descriptor >> 62); }
  void check(const Site& site) const {
    const auto repeat = static_cast<uint32_t>(relpos::repeat_of(swizzle()));
    if (field(0) % repeat >= 128 || (descriptor >> 49 & 7) != 0)
      fail(site, "wgmma: a matrix at shared address %u is not where its swizzle repeats (%u)", field(0), repeat);
  }
  uint32_t field(int bit) const { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; }

  uint32_t address(int mn, int k) const {
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    const bool plain = swizzle() == relpos::Swizzle::kNone;
    const int span = relpos::span_of(swizzle()), row = span / 2;
    if (!mn_major)
      return swizzled(start + mn / 8 * stride + mn % 8 * span + k / 8 * (plain ? leading : 16) + k % 8 * 2, swizzle());
    const uint32_t next_row = plain ? stride : leading, next_8 = plain ? leading : stride;
    return swizzled(start + mn / row * next_row + mn % row * 2 + k / 8 * next_8 + k % 8 * span, swizzle());
  }

  template <typename T>
  float at(int mn, int k, const Site& site) const {
    const auto* const element = static_cast<const volatile uint16_t*>(shared_pointer(address(mn, k), site));
    enter_async_proxy();
    const uint16_t bits = *element;
    leave_async_proxy();
    return to_float(__builtin_bit_cast(T, bits));
  }
};

// A thread's part of a product: two rows, and of every 8 columns two.
struct Rows {
  float a[2][16];
};
template <typename T, int N>
void add_product(float* d, const Rows& rows, const Matrix& b, bool accumulate, const Site& site) {
  for (int i = 0; i < N / 2; ++i) {
    const int column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
    double sum = accumulate ? d[i] : 0;
    for (int k = 0; k < 16; ++k) sum += double{rows.a[i / 2 % 2][k]} * b.at<T>(column, k, site);
    d[i] = static_cast<float>(sum);
  }
}

template <int R>
void product(float (&d)[R], std::function<void(float*)> of_thread, const Site& site) {
  warpgroup_op(kWgmma, site);
  if (start_product(d, R, of_thread, site)) of_thread(d);
}

struct Registers {
  uint32_t r[4];
};

// The reverse of load_matrices: lane l brings elements (l / 4, 2 (l % 4)) and the next of each matrix.
struct Stored {
  const void* row;
  uint32_t r[4];
};
template <bool TRANS>
void store_matrices(void* row, const uint32_t (&r)[4], const Site& site) {
  check_shared_row(row, "stmatrix", site);
  const Gathered warp = gather(kStmatrix, ~0u, Stored{row, {r[0], r[1], r[2], r[3]}}, site);
  if (lane() == 0) {
    const void* rows[warpSize];
    for (int l = 0; l < warpSize; ++l) rows[l] = warp.at<Stored>(l).row;
    count_conflicts(rows, 4);
  }
  const int matrix = lane() / 8, i = lane() % 8;
  for (int k = 0; k < 8; ++k) {
    const int from_row = TRANS ? k : i, from_column = TRANS ? i : k;
    const uint32_t pair = warp.at<Stored>(4 * from_row + from_column / 2).r[matrix];
    static_cast<uint16_t*>(row)[k] = static_cast<uint16_t>(pair >> 16 * (from_column % 2));
  }
}

}  // namespace simt

namespace relpos {

inline void stmatrix_x4(void* row, const uint32_t (&r)[4], simt::Site site = simt::Site::current()) {
  simt::store_matrices<false>(row, r, site);
}
inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], simt::Site site = simt::Site::current()) {
  simt::store_matrices<true>(row, r, site);
}

inline void named_barrier_sync(int id, int threads, simt::Site site = simt::Site::current()) {
  simt::named_barrier(id, threads, true, site);
}
inline void named_barrier_arrive(int id, int threads, simt::Site site = simt::Site::current()) {
  simt::named_barrier(id, threads, false, site);
}

inline void mbarrier_init(uint64_t* bar, int count, simt::Site site = simt::Site::current()) {
  simt::check_shared(bar, 8, 8, "mbarrier", site);
  simt::mbarrier_init(bar, count, site);
  *bar = simt::kInitialised;
}
inline void mbarrier_fence_init() { simt::show_mbarriers(); }
inline void mbarrier_expect_bytes(uint64_t* bar, int bytes, simt::Site site = simt::Site::current()) {
  simt::check_mbarrier(bar, site);
  simt::mbarrier_arrive(bar, bytes, site);
}
inline void mbarrier_arrive(uint64_t* bar, simt::Site site = simt::Site::current()) {
  mbarrier_expect_bytes(bar, 0, site);
}
inline void mbarrier_wait(uint64_t* bar, int parity, simt::Site site = simt::Site::current()) {
  simt::check_mbarrier(bar, site);
  simt::mbarrier_wait(bar, parity, site);
}

inline void fence_proxy_async() { simt::fence_proxies(); }

template <int RANK>
void tma_load(void* dst, const TensorMap& map, uint64_t* bar, const int (&at)[RANK],
              simt::Site site = simt::Site::current()) {
  if (map.rank != RANK) simt::fail(site, "tma_load: %d coordinates of %d axes", RANK, map.rank);
  if (at[0] * map.element_bytes % 16 != 0)  // to a GPU, an illegal instruction
    simt::fail(site, "tma_load: element %d of axis 0 is not 16-byte aligned", at[0]);
  simt::check_mbarrier(bar, site);
  simt::check_shared(dst, map.box_bytes(), std::max(128, repeat_of(map.swizzle)), "tma_load", site);
  struct {
    int of[5];
  } first{};
  for (int i = 0; i < RANK; ++i) first.of[i] = at[i];
  const auto copy = map.element_bytes == 2 ? simt::copy_box<uint16_t> : simt::copy_box<uint32_t>;
  simt::start_copy(bar, map.box_bytes(), [=, to = simt::shared_address(dst)] { copy(map, to, first.of, site); }, site);
}

inline float no_accumulators[1];
template <int A = 1, int B = 1, int C = 1>
void wgmma_fence(float (&)[A] = no_accumulators, float (&)[B] = no_accumulators, float (&)[C] = no_accumulators,
                 simt::Site site = simt::Site::current()) {
  simt::wgmma_fence(site);
}
inline void wgmma_commit() { simt::wgmma_commit(); }
template <int N, int A = 1, int B = 1, int C = 1>
void wgmma_wait(float (&)[A] = no_accumulators, float (&)[B] = no_accumulators, float (&)[C] = no_accumulators,
                simt::Site site = simt::Site::current()) {
  simt::wgmma_wait(N, site);
}

inline uint64_t wgmma_descriptor(const void* p, int leading_bytes, int stride_bytes, Swizzle swizzle) {
  return encode_descriptor(simt::shared_address(p), leading_bytes, stride_bytes, swizzle);
}

template <typename T, int N, bool B_MN_MAJOR>
void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, simt::Site site = simt::Site::current()) {
  const simt::Matrix a_matrix{a, false}, b_matrix{b, B_MN_MAJOR};
  a_matrix.check(site), b_matrix.check(site);
  simt::product(
      d,
      [=](float* sum) {
        const int row = simt::thread_index() % 128 / 32 * 16 + simt::lane() / 4;
        simt::Rows rows;
        for (int i = 0; i < 32; ++i) rows.a[i / 16][i % 16] = a_matrix.at<T>(row + i / 16 * 8, i % 16, site);
        simt::add_product<T, N>(sum, rows, b_matrix, accumulate, site);
      },
      site);
}

template <typename T, int N, bool B_MN_MAJOR>
void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
              simt::Site site = simt::Site::current()) {
  const simt::Matrix b_matrix{b, B_MN_MAJOR};
  b_matrix.check(site);
  const simt::Registers mine{{a[0], a[1], a[2], a[3]}};
  const simt::Gathered warp = simt::gather(simt::kWgmmaSync, ~0u, mine, site);
  simt::Rows rows;
  for (int i = 0; i < 32; ++i) {
    const int h = i / 16, k = i % 16, holder = simt::lane() / 4 * 4 + k % 8 / 2;
    rows.a[h][k] = simt::half_of<T>(warp.at<simt::Registers>(holder).r[k / 8 * 2 + h], k % 2);
  }
  simt::product(
      d,
      [=, registers = &a[0]](float* sum) {
        if (std::memcmp(registers, mine.r, sizeof mine.r) != 0)
          simt::fail(site, "an operand in registers was changed before wgmma_wait");
        simt::add_product<T, N>(sum, rows, b_matrix, accumulate, site);
      },
      site);
}

template <int REGISTERS>
void setmaxnreg_inc(simt::Site site = simt::Site::current()) {
  static_assert(REGISTERS % 8 == 0 && 24 <= REGISTERS && REGISTERS <= 256);
  simt::warpgroup_op(simt::kSetmaxnreg, site);
}
template <int REGISTERS>
void setmaxnreg_dec(simt::Site site = simt::Site::current()) {
  setmaxnreg_inc<REGISTERS>(site);
}

}  // namespace relpos
