// selftest_sm90.cuh - small kernels that use all that Hopper added, each with faults to plant.
//
// selftest_sm90.cpp runs them on the emulator, benchmarks/probe_sm90.cu on a GPU; cases_sm90.py has the data and the
// answers. A fault is a string, known to the emulator only; tests look for the source lines marked "line: name".
#pragma once
#include <cstring>
#include <map>
#include <string>
#include <string_view>

#ifdef RELPOS_EMULATE
#include "sm90.h"
#else
#include "../../csrc/cuda/tile/ptx.cuh"
#endif

#ifndef WGMMA_N  // fewer compile faster
#define WGMMA_N 32, 48, 64, 80, 96, 112, 128
#endif

namespace selftest {

using relpos::Swizzle;

struct Operand {                  // of wgmma, in shared memory
  int at, leading, stride, next;  // bytes; next: from one k16 step to the next, of so many
  int steps, span;                // bytes from the first of those to the first of the next so many
  Swizzle swizzle;

  __device__ int of_step(int step) const { return at + step / steps * span + step % steps * next; }
};

struct Given {  // by selftest_sm90.py
  const void *a, *b;
  void* out;
  int64_t a_bytes, b_bytes, out_bytes;
  int n;
  int at[5];
  relpos::Tiling tiling;  // of a
  Operand a_operand, b_operand;
  const char* planted;  // empty: the kernel is right
};

struct Params : Given {
  relpos::TensorMap a_map, b_map;

#ifdef RELPOS_EMULATE
  bool fault(std::string_view name) const { return planted == name; }
#else
  __device__ constexpr bool fault(const char*) const { return false; }
#endif
};

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

// out = 32 rows of 16 bytes, stored as stmatrix does what the lanes hold, a[lane, 4].
template <bool TRANS>
struct Stmatrix {
  static constexpr int kThreads = 32;

  static __device__ void run(const Params& p) {
    RELPOS_DYNAMIC_SHARED_1024(smem);
    uint32_t r[4];
    memcpy(r, static_cast<const uint32_t*>(p.a) + thread() * 4, sizeof r);
    unsigned char* const row = smem + thread() * 16;
    if constexpr (TRANS)
      relpos::stmatrix_x4_trans(row, r);
    else
      relpos::stmatrix_x4(row, r);
    __syncwarp();
    memcpy(static_cast<unsigned char*>(p.out) + thread() * 16, row, 16);
  }
};

// out[t] = n times t, handed from the first two warps to the last two, one value at a time. Barrier 1: it has been
// written; 2: it may be overwritten.
struct Relay {
  static constexpr int kThreads = 128;

  static __device__ void run(const Params& p) {
    RELPOS_DYNAMIC_SHARED_1024(smem);
    int* const box = reinterpret_cast<int*>(smem);
    if (p.fault("part of a warp") && thread() % 32 >= 16) return;
    int sum = 0;
    for (int round = 0; round < p.n; ++round) {
      if (thread() < 64) {
        if (round > 0 && !p.fault("overwrites")) relpos::named_barrier_sync(2, 128);
        box[thread()] = thread();
        if (p.fault("id 0")) relpos::named_barrier_arrive(0, 128);
        if (p.fault("no whole warps")) relpos::named_barrier_arrive(1, 100);
        if (p.fault("another count")) relpos::named_barrier_arrive(1, 96);
        if (!p.fault("does not arrive")) relpos::named_barrier_arrive(1, 128);
      } else {
        if (!p.fault("reads early")) relpos::named_barrier_sync(1, 128);  // line: relay
        sum += box[thread() - 64];
        box[thread() - 64] = -1;
        if (round + 1 < p.n) relpos::named_barrier_arrive(2, 128);
      }
    }
    if (thread() >= 64) static_cast<int*>(p.out)[thread() - 64] = sum;
  }
};

// out = the bytes of shared memory after one copy of TMA into the middle of them.
template <int RANK>
struct Tma {
  static constexpr int kThreads = 32;

  static __device__ void run(const Params& p) {
    RELPOS_DYNAMIC_SHARED_1024(smem);
    if (p.fault("aligned to 16")) RELPOS_DYNAMIC_SHARED(other);  // the shim believes who asks last
    uint64_t* const bar = reinterpret_cast<uint64_t*>(smem);
    unsigned char* const box = smem + 1024 + 128 * p.fault("off the swizzle") + p.n * p.fault("outside");
    if (thread() == 0) {
      relpos::mbarrier_init(bar, 1);
      relpos::mbarrier_fence_init();
      relpos::mbarrier_expect_bytes(bar, p.n - 1024);
      int at[RANK];
      for (int i = 0; i < RANK; ++i) at[i] = p.at[i];
      relpos::tma_load<RANK>(box, p.a_map, bar, at);  // line: tma
    }
    __syncthreads();
    relpos::mbarrier_wait(bar, 0);
    for (int i = 1024 + thread(); i < p.n; i += 32) static_cast<unsigned char*>(p.out)[i] = smem[i];
  }
};

// out[thread, N / 2] = a b over n steps of 16: a in shared memory or, RS, in the registers that `b` holds for every
// step. The bytes of shared memory are those of `a`, as the test has laid them out.
template <typename T, int N, bool B_MN_MAJOR, bool RS>
struct Wgmma {
  static constexpr int kThreads = 128;

  static __device__ void run(const Params& p) {
    RELPOS_DYNAMIC_SHARED_1024(smem);
    const Operand &a = p.a_operand, &b = p.b_operand;
    for (int i = thread(); i < p.at[0]; i += 128) smem[i] = static_cast<const unsigned char*>(p.a)[i];
    if (!p.fault("no fence_proxy_async")) relpos::fence_proxy_async();
    __syncthreads();

    float d[N / 2];
    for (float& x : d) x = 7;  // which the first product overwrites
    for (int step = 0; step < p.n; ++step) {
      uint32_t registers[4] = {};  // until the product is waited for
      const auto descriptor = [&](const Operand& m) {
        const int astray = p.fault("off the swizzle") ? 128 : p.fault("outside") ? 1 << 16 : 0;
        return relpos::wgmma_descriptor(smem + m.of_step(step) + astray, m.leading, m.stride, m.swizzle);
      };
      if constexpr (RS) {
        memcpy(registers, static_cast<const uint32_t*>(p.b) + (step * 128 + thread()) * 4, sizeof registers);
        relpos::wgmma_fence(d);
        relpos::wgmma_rs<T, N, B_MN_MAJOR>(d, registers, descriptor(b), step > 0);
      } else {
        relpos::wgmma_fence(d);
        relpos::wgmma_ss<T, N, B_MN_MAJOR>(d, descriptor(a), descriptor(b), step > 0);
      }
      auto& narrow = reinterpret_cast<float (&)[32]>(d);
      if (p.fault("another shape"))
        relpos::wgmma_rs<T, 64, B_MN_MAJOR>(narrow, {}, descriptor(b), true);  // line: shape
      relpos::wgmma_commit();
      if (p.fault("no fence after a commit")) relpos::wgmma_ss<T, N, B_MN_MAJOR>(d, descriptor(a), descriptor(b), true);
      if (RS && p.fault("touches operands")) registers[2] ^= 1;
      relpos::wgmma_wait<0>(d);
    }
    memcpy(static_cast<float*>(p.out) + thread() * N / 2, d, sizeof d);
    __syncthreads();
    for (int i = thread(); i < p.at[0]; i += 128) smem[i] = 0;  // nobody reads it any more
  }
};

// out[64, 64] = a[64, 64 n] b[64 n, 64], float16: one warpgroup loads tiles of 64 k into two stages, one multiplies.
//
//   full[s]   the two tiles of stage s have arrived        empty[s]   the warpgroup has read them
constexpr int kTile = 64 * 64 * 2;

struct Stages {
  unsigned char* smem;
  uint64_t *full = reinterpret_cast<uint64_t*>(smem), *empty = full + 2;
  __device__ unsigned char* a(int stage) const { return smem + 1024 + stage * kTile; }
  __device__ unsigned char* b(int stage) const { return smem + 1024 + (2 + stage) * kTile; }
};

__device__ inline void produce(const Params& p, const Stages& pipe) {
  relpos::setmaxnreg_dec<24>();  // line: dec
  if (thread() != 128) return;
  const int tiles = p.n + p.fault("a copy too many");
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % 2, round = tile / 2;
    if (!p.fault("overwrites a stage")) relpos::mbarrier_wait(pipe.empty + stage, round % 2 ^ 1);  // line: empty
    const int missing = p.fault("one tile's bytes") ? kTile : p.fault("half a tile's bytes") ? 3 * kTile / 2 : 0;
    relpos::mbarrier_expect_bytes(pipe.full + stage, p.fault("too many bytes") ? 3 * kTile : 2 * kTile - missing);
    if (p.fault("arrives twice")) relpos::mbarrier_arrive(pipe.full + stage);  // line: twice
    relpos::tma_load<2>(pipe.a(stage), p.a_map, pipe.full + stage, {64 * tile, 0});
    relpos::tma_load<2>(pipe.b(stage), p.b_map, pipe.full + stage, {0, 64 * tile});
  }
}

__device__ inline void consume(const Params& p, const Stages& pipe) {
  if (p.fault("half a warpgroup") && thread() < 64) return;
  relpos::setmaxnreg_inc<240>();
  float d[32] = {};
  for (int tile = 0; tile < p.n; ++tile) {
    const int stage = tile % 2, round = tile / 2;
    const int parity = p.fault("no parity") ? 2 : round % 2 ^ p.fault("wrong parity");
    if (!p.fault("no wait for a copy")) relpos::mbarrier_wait(pipe.full + stage, parity);  // line: full
    if (!p.fault("no wgmma_fence")) relpos::wgmma_fence(d);
    for (int k = 0; k < 64; k += 16)
      relpos::wgmma_ss<__half, 64, true>(
          d, relpos::wgmma_descriptor(pipe.a(stage) + 2 * k, 16, p.fault("wrong stride") ? 512 : 1024, Swizzle::k128),
          relpos::wgmma_descriptor(pipe.b(stage) + 128 * k, 1024, 1024, Swizzle::k128), true);
    if (!p.fault("no wgmma_commit")) relpos::wgmma_commit();
    if (p.fault("touches accumulators")) d[5] = 0;
    if (p.fault("releases early")) relpos::mbarrier_arrive(pipe.empty + stage);
    if (!p.fault("no wgmma_wait")) relpos::wgmma_wait<0>(d);
    if (!p.fault("releases early")) relpos::mbarrier_arrive(pipe.empty + stage);
  }
  for (int i = 0; i < 32; ++i) {
    const int row = thread() / 32 * 16 + thread() % 32 / 4 + i / 2 % 2 * 8,
              column = i / 4 * 8 + thread() % 4 * 2 + i % 2;
    static_cast<float*>(p.out)[row * 64 + column] = d[i];
  }
}

struct Pipeline {
  static constexpr int kThreads = 384;  // so many would share the registers, of which these 256 have to ask for more

  static __device__ void run(const Params& p) {
    RELPOS_DYNAMIC_SHARED_1024(smem);
    const Stages pipe{smem};
    if (thread() == 0) {
      for (int stage = 0; stage < 2; ++stage) {
        relpos::mbarrier_init(pipe.full + stage, 1);
        relpos::mbarrier_init(pipe.empty + stage, 128);
      }
      if (p.fault("initialised twice")) relpos::mbarrier_init(pipe.full, 1);
      if (!p.fault("barriers not shown to TMA")) relpos::mbarrier_fence_init();
    }
    if (!p.fault("barriers used at once")) __syncthreads();
    if (thread() >= 128)
      produce(p, pipe);
    else
      consume(p, pipe);
  }
};

// A kernel of each, empty on architectures that lack the instructions.
template <typename Test>
__global__ void __launch_bounds__(Test::kThreads, 1) kernel(const __grid_constant__ Params p) {
#if defined(RELPOS_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Test::run(p);
#endif
}

struct Config {
  void (*kernel)(Params);
  int threads;
  int shared;  // bytes; 0: as Given says
};
template <typename Test>
Config config(int shared = 0, int threads = Test::kThreads) {
  return {kernel<Test>, threads, shared};
}
using Kernels = std::map<std::string, Config>;

template <typename T, int N>
void add_wgmma(Kernels& kernels, const std::string& type) {
  const std::string name = " " + type + " " + std::to_string(N);
  kernels["ss" + name + " k"] = config<Wgmma<T, N, false, false>>();
  kernels["ss" + name + " mn"] = config<Wgmma<T, N, true, false>>();
  kernels["rs" + name + " k"] = config<Wgmma<T, N, false, true>>();
  kernels["rs" + name + " mn"] = config<Wgmma<T, N, true, true>>();
}
template <int... N>
Kernels all_kernels() {
  constexpr int kShared = 1024 + 4 * kTile;
  Kernels kernels{
      {"stmatrix", config<Stmatrix<false>>(512)},
      {"stmatrix trans", config<Stmatrix<true>>(512)},
      {"relay", config<Relay>(256)},
      {"pipeline", config<Pipeline>(kShared, 256)},
      {"pipeline without a producer warpgroup", config<Pipeline>(kShared, 160)},
      {"tma 1", config<Tma<1>>()},
      {"tma 2", config<Tma<2>>()},
      {"tma 3", config<Tma<3>>()},
      {"tma 4", config<Tma<4>>()},
      {"tma 5", config<Tma<5>>()},
  };
  (add_wgmma<__half, N>(kernels, "float16"), ...);
  (add_wgmma<__nv_bfloat16, N>(kernels, "bfloat16"), ...);
  return kernels;
}

// Makes the tensor maps of p, whose pointers are the device's; returns the bytes of shared memory.
inline int prepare(Params& p, const Config& c) {
  p.tiling.base = p.a;
  if (p.tiling.rank != 0) p.a_map = relpos::make_tensor_map(p.tiling);
  if (c.kernel == kernel<Pipeline>) {
    p.a_map = relpos::make_tensor_map({p.a, 2, 2, {64 * p.n, 64}, {2, 128 * p.n}, {64, 64}, Swizzle::k128});
    p.b_map = relpos::make_tensor_map({p.b, 2, 2, {64, 64 * p.n}, {2, 128}, {64, 64}, Swizzle::k128});
  }
  return c.shared != 0 ? c.shared : p.tiling.rank != 0 ? p.n : p.at[0];
}

}  // namespace selftest
