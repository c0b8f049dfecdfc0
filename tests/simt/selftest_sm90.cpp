// selftest_sm90.cpp - small kernels that use every part of sm90.h, each with faults to plant.
//
// As in selftest.cpp a fault is a string. tests/test_simt_sm90.py fills Params, calls run() and looks for the source
// lines marked "line: name"; selftest_sm90.py does it under a race detector.
#include <cstring>
#include <map>
#include <string>
#include <string_view>

#include "sm90.h"

#ifndef WGMMA_N  // fewer compile faster
#define WGMMA_N 64, 80, 96, 112, 128
#endif

namespace {

using relpos::Swizzle;

struct Operand {                  // of wgmma, in shared memory
  int at, leading, stride, next;  // bytes; next: from one k16 step to the next
  Swizzle swizzle;
};

struct Params {
  const void *a, *b;
  void* out;
  int n;
  int at[5];
  relpos::Tiling tiling;
  Operand a_operand, b_operand;
  const char* planted;  // empty: the kernel is right
  relpos::TensorMap a_map, b_map;

  bool fault(std::string_view name) const { return planted == name; }
};

__device__ int thread() { return static_cast<int>(threadIdx.x); }

// out = 32 rows of 16 bytes, stored as stmatrix does what the lanes hold, in[lane, 4].
__global__ void stmatrix_kernel(const __grid_constant__ Params p) {
  RELPOS_DYNAMIC_SHARED(smem);
  uint32_t r[4];
  std::memcpy(r, static_cast<const uint32_t*>(p.a) + thread() * 4, sizeof r);
  unsigned char* const row = smem + thread() * 16;
  if (p.n > 0)
    relpos::stmatrix_x4(row, r);
  else
    relpos::stmatrix_x4_trans(row, r);
  __syncwarp();
  std::memcpy(static_cast<unsigned char*>(p.out) + thread() * 16, row, 16);
}

// out[t] = n times t, handed from the first two warps to the last two, one value at a time. Barrier 1: it has been
// written; 2: it may be overwritten.
__global__ void relay_kernel(const __grid_constant__ Params p) {
  RELPOS_DYNAMIC_SHARED(smem);
  int* const box = reinterpret_cast<int*>(smem);
  if (p.fault("part of a warp") && thread() % 32 >= 16) return;
  int sum = 0;
  for (int round = 0; round < p.n; ++round) {
    if (thread() < 64) {
      if (round > 0 && !p.fault("overwrites")) relpos::named_barrier_sync(2, 128);
      box[thread()] = thread();
      if (p.fault("id 0")) relpos::named_barrier_arrive(0, 128);
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

// out = the bytes of shared memory after one copy of TMA into the middle of them.
template <int RANK>
__global__ void tma_kernel(const __grid_constant__ Params p) {
  RELPOS_DYNAMIC_SHARED_1024(smem);
  if (p.fault("aligned to 16")) RELPOS_DYNAMIC_SHARED(smem);  // the shim believes the last one
  uint64_t* const bar = reinterpret_cast<uint64_t*>(smem);
  unsigned char* const box = smem + 1024 + 128 * p.fault("off the swizzle") + p.n * p.fault("outside");
  if (thread() == 0) {
    relpos::mbarrier_init(bar, 1);
    relpos::mbarrier_fence_init();
    relpos::mbarrier_expect_bytes(bar, p.n - 1024);
    int at[RANK];
    std::copy(p.at, p.at + RANK, at);
    relpos::tma_load<RANK>(box, p.a_map, bar, at);  // line: tma
  }
  __syncthreads();
  relpos::mbarrier_wait(bar, 0);
  for (int i = 1024 + thread(); i < p.n; i += 32) static_cast<unsigned char*>(p.out)[i] = smem[i];
}

// out[thread, N / 2] = a b over n steps of 16: a in shared memory or, RS, in the registers that `b` holds for every
// step. The bytes of shared memory are those of `a`, as the test has laid them out.
template <typename T, int N, bool B_MN_MAJOR, bool RS>
__global__ void wgmma_kernel(const __grid_constant__ Params p) {
  RELPOS_DYNAMIC_SHARED_1024(smem);
  const Operand &a = p.a_operand, &b = p.b_operand;
  for (int i = thread(); i < p.at[0]; i += 128) smem[i] = static_cast<const unsigned char*>(p.a)[i];
  if (!p.fault("no fence_proxy_async")) relpos::fence_proxy_async();
  __syncthreads();

  float d[N / 2];
  uint32_t registers[4];
  relpos::wgmma_fence(d);
  for (int step = 0; step < p.n; ++step) {
    const auto descriptor = [&](const Operand& m) {
      return relpos::wgmma_descriptor(smem + m.at + step * m.next, m.leading, m.stride, m.swizzle);
    };
    if constexpr (RS) {
      std::memcpy(registers, static_cast<const uint32_t*>(p.b) + (step * 128 + thread()) * 4, sizeof registers);
      relpos::wgmma_rs<T, N, B_MN_MAJOR>(d, registers, descriptor(b), step > 0);
    } else {
      relpos::wgmma_ss<T, N, B_MN_MAJOR>(d, descriptor(a), descriptor(b), step > 0);  // line: wgmma
    }
  }
  relpos::wgmma_commit();
  relpos::wgmma_wait<0>(d);
  std::memcpy(static_cast<float*>(p.out) + thread() * N / 2, d, sizeof d);
}

// out[64, 64] = a[64, 64 n] b[64 n, 64], float16: a warp loads tiles of 64 k into two stages, a warpgroup multiplies.
//
//   full[s]   the two tiles of stage s have arrived        empty[s]   the warpgroup has read them
constexpr int kTile = 64 * 64 * 2;

struct Pipeline {
  unsigned char* smem;
  uint64_t *full = reinterpret_cast<uint64_t*>(smem), *empty = full + 2;
  unsigned char* a(int stage) const { return smem + 1024 + stage * kTile; }
  unsigned char* b(int stage) const { return smem + 1024 + (2 + stage) * kTile; }
};

__device__ void produce(const Params& p, const Pipeline& pipe) {
  if (p.fault("setmaxnreg by one warp")) relpos::setmaxnreg_dec<24>();
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

__device__ void consume(const Params& p, const Pipeline& pipe) {
  if (p.fault("half a warpgroup") && thread() < 64) return;
  relpos::setmaxnreg_inc<240>();
  float d[32] = {};
  for (int tile = 0; tile < p.n; ++tile) {
    const int stage = tile % 2, round = tile / 2;
    if (!p.fault("no wait for a copy"))
      relpos::mbarrier_wait(pipe.full + stage, round % 2 ^ p.fault("wrong parity"));  // line: full
    if (!p.fault("no wgmma_fence")) relpos::wgmma_fence(d);
    for (int k = 0; k < 64; k += 16)
      relpos::wgmma_ss<__half, 64, true>(
          d, relpos::wgmma_descriptor(pipe.a(stage) + 2 * k, 16, p.fault("wrong stride") ? 512 : 1024, Swizzle::k128),
          relpos::wgmma_descriptor(pipe.b(stage) + 128 * k, 1024, 1024, Swizzle::k128), true);  // line: product
    relpos::wgmma_commit();
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

__global__ void pipeline_kernel(const __grid_constant__ Params p) {
  RELPOS_DYNAMIC_SHARED_1024(smem);
  const Pipeline pipe{smem};
  if (thread() == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      relpos::mbarrier_init(pipe.full + stage, 1);
      relpos::mbarrier_init(pipe.empty + stage, 128);
    }
    if (!p.fault("barriers not shown to TMA")) relpos::mbarrier_fence_init();
  }
  if (!p.fault("barriers used at once")) __syncthreads();
  if (thread() >= 128)
    produce(p, pipe);
  else
    consume(p, pipe);
}

struct Config {
  void (*kernel)(Params);
  int threads;
  int shared;  // bytes; 0: as many as Params::at[0] or n
};
using Kernels = std::map<std::string, Config>;

template <typename T, int N>
void add_wgmma(Kernels& kernels, const std::string& type) {
  const std::string name = " " + type + " " + std::to_string(N);
  kernels["ss" + name + " k"] = {wgmma_kernel<T, N, false, false>, 128, 0};
  kernels["ss" + name + " mn"] = {wgmma_kernel<T, N, true, false>, 128, 0};
  kernels["rs" + name + " k"] = {wgmma_kernel<T, N, false, true>, 128, 0};
  kernels["rs" + name + " mn"] = {wgmma_kernel<T, N, true, true>, 128, 0};
}
template <int... N>
Kernels all_kernels() {
  Kernels kernels{
      {"stmatrix", {stmatrix_kernel, 32, 512}},
      {"relay", {relay_kernel, 128, 256}},
      {"pipeline", {pipeline_kernel, 160, 1024 + 4 * kTile}},
      {"tma 1", {tma_kernel<1>, 32, 0}},
      {"tma 2", {tma_kernel<2>, 32, 0}},
      {"tma 3", {tma_kernel<3>, 32, 0}},
      {"tma 4", {tma_kernel<4>, 32, 0}},
      {"tma 5", {tma_kernel<5>, 32, 0}},
  };
  (add_wgmma<__half, N>(kernels, "float16"), ...);
  (add_wgmma<__nv_bfloat16, N>(kernels, "bfloat16"), ...);
  return kernels;
}

}  // namespace

// The shim's complaint, or null.
extern "C" const char* run(const char* kernel, const Params* given) {
  static const Kernels kernels = all_kernels<WGMMA_N>();
  static std::string complaint;
  try {
    const Config& c = kernels.at(kernel);
    Params p = *given;
    if (p.tiling.rank != 0) p.a_map = relpos::make_tensor_map(p.tiling);
    if (c.kernel == pipeline_kernel) {
      p.a_map = relpos::make_tensor_map({p.a, 2, 2, {64 * p.n, 64}, {2, 128 * p.n}, {64, 64}, Swizzle::k128});
      p.b_map = relpos::make_tensor_map({p.b, 2, 2, {64, 64 * p.n}, {2, 128}, {64, 64}, Swizzle::k128});
    }
    const int shared = c.shared != 0 ? c.shared : p.tiling.rank != 0 ? p.n : p.at[0];
    simt::launch(c.kernel, 1, static_cast<unsigned>(c.threads), static_cast<size_t>(shared), p);
  } catch (const std::exception& e) {
    complaint = e.what();
    return complaint.c_str();
  }
  return nullptr;
}
