// simt.h - runs a CUDA kernel's own source on the CPU: a fiber per CUDA thread, block after block.
//
//   simt::launch(kernel, grid, block, shared_bytes, params...)
//
//                  fiber 0   fiber 1  ...  fiber 31 | fiber 32 ...
//   kernel code       |         |             |     |    |         a fiber runs until it meets
//   warp op        ---+---------+-----...-----+--   |    |         a warp op or a barrier; then
//   __syncthreads  ===+=========+=====...=====+=====+====+======   another one runs
//
// A kernel that reads what another thread wrote without a barrier between therefore meets poison or
// an old value under at least one schedule: SIMT_SCHED=fifo|lifo|random, SIMT_SEED=n.
//
// Shared memory has its exact size, is all NaN when a block starts, and lies between guard zones.
// cp.async delivers at the wait (SIMT_ASYNC=late, the default), at once (early), or now so and now so (random).
// What CUDA leaves undefined, and the shim can see, throws simt::Error: see simt.cpp.
//
// Built with a sanitizer (toolchain.py), the same run also reports what a GPU would not: ThreadSanitizer every pair of
// accesses that no barrier orders (of a warp's ops only __syncwarp does), AddressSanitizer those outside a tensor.
//
// Not modelled: the rounding inside mma (here: exact products and sum, one rounding).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <type_traits>

// ---- the language: CUDA's keywords; a static __shared__ array would be private to a thread

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "no static __shared__: use RELPOS_DYNAMIC_SHARED(name)");
#define RELPOS_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::shared_memory(16)

extern uint3 threadIdx, blockIdx;  // those of the running fiber
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- the machine: implemented in simt.cpp

namespace simt {

using Site = std::source_location;  // where the kernel calls, for messages

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Stats {  // of all launches; a warp's instruction counts once
  long mma, ldmatrix, shuffles, votes, warp_barriers, block_barriers;
  long bank_conflicts;  // ldmatrix, stmatrix: 8 rows in fewer than 8 columns of 16 bytes; the missing columns
  long cp_async, tma;   // per thread
  long stmatrix, named_barriers;
  long wgmma, warpgroup_syncs;  // of a warpgroup, of a warp
};
const Stats& stats();
void reset_stats();

struct Op {
  const char* name;
  long Stats::* counter;
  bool whole_warp = false;  // the .sync.aligned instructions
  bool orders_memory = false;
};
inline constexpr Op kMma{"mma", &Stats::mma, true};
inline constexpr Op kLdmatrix{"ldmatrix", &Stats::ldmatrix, true};
inline constexpr Op kShuffle{"shuffle", &Stats::shuffles};
inline constexpr Op kVote{"vote", &Stats::votes};
inline constexpr Op kSyncwarp{"__syncwarp", &Stats::warp_barriers, false, true};
inline constexpr Op kSyncthreads{"__syncthreads", &Stats::block_barriers, false, true};

// What each lane of a warp brought to a warp op.
struct alignas(16) Slot {
  unsigned char bytes[48];
};
struct Gathered {
  const Slot* slots;
  unsigned present;

  template <typename T>
  const T& at(int lane) const {
    return *reinterpret_cast<const T*>(slots[lane].bytes);
  }
};

// 16 bytes on their way to shared memory.
struct Copy {
  void* dst;
  const void* src;  // null: zeros
  int group;
};

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void block_barrier(const Site& site);
Gathered warp_op(const Op& op, unsigned mask, const void* mine, size_t bytes, const Site& site);
bool start_copy(const void* dst, const void* src, const Site& site);  // whether it is to arrive at once
void copy_commit();
bool next_copy(int groups_left, Copy& copy);  // one that must have arrived when that many groups are under way
void check_shared_row(const void* row, const char* what, const Site& site);
void count_conflicts(const Gathered& rows, int matrices);
unsigned char* shared_memory(unsigned alignment);
[[noreturn]] void fail(const Site& site, const char* format, ...) __attribute__((format(printf, 2, 3)));

template <typename... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, std::type_identity_t<P>... params) {
  run(grid, block, shared_bytes, [&] { kernel(params...); });
}

inline int thread_index() {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}
inline int lane() { return thread_index() % warpSize; }

template <typename T>
Gathered gather(const Op& op, unsigned mask, const T& mine, const Site& site) {
  static_assert(sizeof(T) <= sizeof(Slot) && std::is_trivially_copyable_v<T>);
  return warp_op(op, mask, &mine, sizeof(T), site);
}

// Lane `source` of this lane's segment of `width` lanes; a source outside it means the own value.
template <typename T>
T shuffle(unsigned mask, T value, int source, int width, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  const int first = lane() & ~(width - 1);
  if (source < first || source >= first + width) source = lane();
  const Gathered warp = gather(kShuffle, mask, value, site);
  if (!(warp.present >> source & 1))
    fail(site, "shuffle reads lane %d, which does not take part (mask %08x)", source, mask);
  return warp.at<T>(source);
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
  if (lane() == 0) count_conflicts(rows, MATRICES);
  const int major = lane() / 4, minor = lane() % 4 * 2;
  for (int j = 0; j < MATRICES; ++j) {
    const auto element = [&](int i, int k) -> uint32_t { return rows.at<Row>(8 * j + i)[k]; };
    r[j] = TRANS ? element(minor, major) | element(minor + 1, major) << 16
                 : element(major, minor) | element(major, minor + 1) << 16;
  }
}

}  // namespace simt

// ---- CUDA's built-in functions

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::block_barrier(site); }

inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::Site::current()) {
  simt::warp_op(simt::kSyncwarp, mask, nullptr, 0, site);
}

template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, simt::Site site = simt::Site::current()) {
  const int first = simt::lane() & ~(width - 1);
  return simt::shuffle(mask, v, first + (source & (width - 1)), width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle(mask, v, simt::lane() ^ bits, width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, int by, int width = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle(mask, v, simt::lane() + by, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int yes, simt::Site site = simt::Site::current()) {
  const simt::Gathered warp = simt::gather(simt::kVote, mask, yes, site);
  unsigned ballot = 0;
  for (int l = 0; l < warpSize; ++l)
    if (warp.present >> l & 1) ballot |= unsigned{warp.at<int>(l) != 0} << l;
  return ballot;
}
inline int __any_sync(unsigned mask, int yes, simt::Site site = simt::Site::current()) {
  return __ballot_sync(mask, yes, site) != 0;
}
inline int __all_sync(unsigned mask, int yes, simt::Site site = simt::Site::current()) {
  return __ballot_sync(mask, !yes, site) == 0;
}

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {  // blocks and fibers never run at once
  const T old = *address;
  *address = old + value;
  return old;
}

// As in CUDA: integers of one type, and floats, of which a NaN is never preferred.
template <typename T>
  requires std::is_arithmetic_v<T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(a, b);
  else
    return a < b ? b : a;
}
template <typename T>
  requires std::is_arithmetic_v<T>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(a, b);
  else
    return b < a ? b : a;
}

// ---- csrc/cuda/tile/ptx.cuh, emulated: the same names and arguments

namespace relpos {

// d += a b on 16 x 16 and 16 x 8 tiles. Lane l holds rows l / 4 and l / 4 + 8 of a and d, column
// l / 4 of b; along the other axis the pairs at 2 (l % 4) and 2 (l % 4) + 8, of d the first only.
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  simt::Site site = simt::Site::current()) {
  struct Fragment {
    float a[8], b[4];
  } mine;
  for (int i = 0; i < 8; ++i) mine.a[i] = simt::half_of<T>(a[i / 2], i % 2);
  for (int i = 0; i < 4; ++i) mine.b[i] = simt::half_of<T>(b[i / 2], i % 2);
  const simt::Gathered warp = simt::gather(simt::kMma, ~0u, mine, site);

  const int row = simt::lane() / 4, col = simt::lane() % 4 * 2;
  double sum[4] = {d[0], d[1], d[2], d[3]};
  for (int quad = 0; quad < 4; ++quad) {  // the lanes that hold this row of a, these columns of b
    const float* const a_row = warp.at<Fragment>(4 * row + quad).a;
    const float* const b_cols[] = {warp.at<Fragment>(4 * col + quad).b, warp.at<Fragment>(4 * col + 4 + quad).b};
    for (int k = 0; k < 4; ++k)  // two neighbours, and the two 8 further
      for (int i = 0; i < 4; ++i) sum[i] += double{a_row[k / 2 * 4 + i / 2 * 2 + k % 2]} * b_cols[i % 2][k];
  }
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(sum[i]);
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
