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
  void (*combine)(struct Slots&) = nullptr;  // what all lanes brought, by the last to come, under no lane's name
};
inline constexpr Op kShuffle{"shuffle", &Stats::shuffles};
inline constexpr Op kVote{"vote", &Stats::votes};
inline constexpr Op kSyncwarp{"__syncwarp", &Stats::warp_barriers, false, true};
inline constexpr Op kSyncthreads{"__syncthreads", &Stats::block_barriers, false, true};

// What the lanes of a warp brought to a warp op, one after the other.
struct alignas(16) Slots {
  uint32_t words[warpSize * 12];

  template <typename T>
  T& at(int lane) {
    return reinterpret_cast<T*>(words)[lane];
  }
};
struct Gathered {
  const uint32_t* words;
  unsigned present;

  template <typename T>
  const T& at(int lane) const {
    return reinterpret_cast<const T*>(words)[lane];
  }
};

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);
void block_barrier(const Site& site);
Gathered warp_op(const Op& op, unsigned mask, const uint32_t* mine, unsigned words, const Site& site);
unsigned char* shared_memory(unsigned alignment);
[[noreturn]] void fail(const Site& site, const char* format, ...) __attribute__((format(printf, 2, 3)));

template <typename... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, std::type_identity_t<P>... params) {
  run(grid, block, shared_bytes, [&] { kernel(params...); });
}

extern int running_thread;  // its number in the block
inline int thread_index() { return running_thread; }
inline int lane() { return thread_index() % warpSize; }

template <typename T>
Gathered gather(const Op& op, unsigned mask, const T& mine, const Site& site) {
  static_assert(sizeof(T) % 4 == 0 && 32 * sizeof(T) <= sizeof(Slots) && std::is_trivially_copyable_v<T>);
  return warp_op(op, mask, reinterpret_cast<const uint32_t*>(&mine), sizeof(T) / 4, site);
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
inline int __popc(unsigned x) { return __builtin_popcount(x); }
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

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
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
