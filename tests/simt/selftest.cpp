// selftest.cpp - small kernels that use every part of the shim, each with faults to plant.
//
// Host code only: a fault is a string, and every kernel takes the same Params. tests/test_simt.py
// calls run() and looks for the source lines marked "line: name".
#include <map>
#include <string>
#include <string_view>

#include "sm80.h"

namespace {

struct Params {
  const void* in;
  void* out;
  int n;
  std::string_view fault;  // empty: the kernel is right
};

__device__ int thread() { return static_cast<int>(threadIdx.x); }

// out[block] = sum of in[0 .. n): shuffles within a warp, shared memory between warps.
__global__ void __launch_bounds__(128) sum_kernel(const __grid_constant__ Params p) {
  RELPOS_DYNAMIC_SHARED(smem);
  float* const partial = reinterpret_cast<float*>(smem);  // one per warp
  const int warps = static_cast<int>(blockDim.x) / warpSize, lane = thread() % warpSize;

  float sum = 0;
  for (int i = thread(); i < p.n; i += static_cast<int>(blockDim.x)) sum += static_cast<const float*>(p.in)[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) partial[thread() / warpSize + (p.fault == "write past the end")] = sum;
  if (p.fault != "no barrier") __syncthreads();
  if (thread() == 0) {
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += partial[w];
    static_cast<float*>(p.out)[blockIdx.x] = sum;
  }
}

// out[t] = in[t + 1], rotating within the block, n rounds through one buffer.
__global__ void rotate_kernel(Params p) {
  RELPOS_DYNAMIC_SHARED(smem);
  float* const buffer = reinterpret_cast<float*>(smem);
  const int threads = static_cast<int>(blockDim.x);
  float mine = static_cast<const float*>(p.in)[thread()];
  for (int round = 0; round < p.n; ++round) {
    buffer[thread()] = mine;
    if (p.fault != "no barrier after the write") __syncthreads();
    mine = buffer[(thread() + 1) % threads];
    if (p.fault != "no barrier after the read") __syncthreads();
  }
  static_cast<float*>(p.out)[thread()] = mine;
}

// Threads wait where CUDA does not allow it.
__global__ void wait_kernel(Params p) {
  if (p.fault == "lane 0 skips a warp barrier") {
    if (thread() != 0) __syncwarp();  // line: warp barrier
    __syncthreads();                  // line: block barrier
  } else if (p.fault == "one warp in another branch") {
    if (thread() < 32)
      __syncthreads();  // line: one branch
    else
      __syncthreads();  // line: other branch
  } else if (p.fault == "two masks for one barrier") {
    __syncwarp(thread() % warpSize < 16 ? 0x0000ffffu : ~0u);
    __syncthreads();
  } else if (p.fault == "not in its mask") {
    __syncwarp(0xfffffffe);
  } else if (p.fault == "reads a lane outside the mask") {
    if (thread() < 16) __shfl_down_sync(0xffffu, 1, 8);
  } else {  // right: half of the threads leave early
    if (thread() >= p.n) return;
    __syncthreads();
  }
  static_cast<float*>(p.out)[thread()] = 1;
}

// out[t] = what the warp functions answer: three votes on t < n, four shuffles of the lane; two words shifted.
__global__ void warp_kernel(Params p) {
  int* const out = static_cast<int*>(p.out) + thread() * 8;
  const int lane = thread() % warpSize;
  out[0] = __any_sync(~0u, thread() < p.n);
  out[1] = __all_sync(~0u, thread() < p.n);
  out[2] = static_cast<int>(__ballot_sync(~0u, thread() < p.n));
  out[3] = __shfl_sync(~0u, lane, 5);
  out[4] = __shfl_down_sync(~0u, lane, 3);
  out[5] = __shfl_sync(~0u, lane, 1, 4);
  out[6] = __shfl_xor_sync(~0u, lane, 5);
  out[7] = static_cast<int>(__funnelshift_r(0x80000006u, 5u, lane));
  atomicAdd(static_cast<int*>(p.out) + 8 * blockDim.x, 1);
}

// d += a b for a [16, 16], b [16, 8] in T, d in float; in holds a then b, row after row.
// The fragments follow the formulas of the PTX ISA, or come through ldmatrix.
template <typename T>
__global__ void matmul_kernel(Params p) {
  RELPOS_DYNAMIC_SHARED(smem);
  const T* const a = static_cast<const T*>(p.in);
  const T* const b = a + 16 * 16;
  const int lane = thread(), group = lane >> 2, in_group = lane % 4;
  T a_regs[8], b_regs[4];
  uint32_t ra[4], rb[2];
  float d[4];
  const auto of_d = [&](int i) {
    return static_cast<float*>(p.out) + (i < 2 ? group : group + 8) * 8 + in_group * 2 + i % 2;
  };

  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
    const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    a_regs[i] = a[row * 16 + col];
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    b_regs[i] = b[row * 8 + group];
    d[i] = *of_d(i);
  }
  std::memcpy(ra, a_regs, sizeof ra), std::memcpy(rb, b_regs, sizeof rb);

  if (p.n == 1) {  // the way kernels do it: a as four 8 x 8 quarters, b transposed on the way
    T* const tile = reinterpret_cast<T*>(smem);
    for (int i = lane; i < 24 * 16; i += warpSize) tile[i] = a[i];
    __syncwarp();
    relpos::ldmatrix_x4(ra, tile + lane % 16 * 16 + lane / 16 * 8);
    relpos::ldmatrix_x2_trans(rb, tile + 16 * 16 + lane % 16 * 8);
  }
  if (p.fault == "half a warp" && lane >= 16) return;
  relpos::mma_m16n8k16<T>(d, ra, rb);  // line: mma
  for (int i = 0; i < 4; ++i) *of_d(i) = d[i];
}

// out[t] = 2^in[t]
__global__ void exp2_kernel(Params p) {
  static_cast<float*>(p.out)[thread()] = relpos::exp2_approx(static_cast<const float*>(p.in)[thread()]);
}

// out[lane, register] as ldmatrix delivers n matrices of 8 rows, 16 bytes each, lying in a row.
__global__ void ldmatrix_kernel(Params p) {
  RELPOS_DYNAMIC_SHARED(smem);
  uint16_t* const tile = reinterpret_cast<uint16_t*>(smem);
  for (int i = thread(); i < 32 * 8; i += warpSize) tile[i] = static_cast<const uint16_t*>(p.in)[i];
  __syncwarp();
  const uint16_t* row = tile + thread() * 8;
  if (p.fault == "misaligned") ++row;
  if (p.fault == "outside") row += 8;
  uint32_t r[4] = {}, half[2] = {};
  if (p.n == 4) relpos::ldmatrix_x4(r, row);  // line: ldmatrix
  if (p.n == -4) relpos::ldmatrix_x4_trans(r, row);
  if (p.n == 2) relpos::ldmatrix_x2(half, row);
  if (p.n == -2) relpos::ldmatrix_x2_trans(half, row);
  if (p.n == 2 || p.n == -2) r[0] = half[0], r[1] = half[1];
  std::memcpy(static_cast<uint32_t*>(p.out) + thread() * 4, r, sizeof r);
}

// out = in, 16 bytes per thread and step, two buffers of shared memory; zeros from float n on.
__global__ void copy_kernel(Params p) {
  RELPOS_DYNAMIC_SHARED(smem);
  constexpr int kSteps = 4, kThreads = 64;
  const auto fetch = [&](int step) {
    const int first = (step * kThreads + thread()) * 4;
    unsigned char* const to = smem + (step % 2 * kThreads + thread()) * 16;
    relpos::cp_async_16(to, static_cast<const float*>(p.in) + first, first < p.n);
    relpos::cp_async_commit();
  };
  const bool in_flight = p.fault == "exits with a copy in flight";
  const bool one_too_few = in_flight || p.fault == "waits for one group too few";
  fetch(0);
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) fetch(step + 1);
    if (one_too_few || step + 1 < kSteps)
      relpos::cp_async_wait<1>();
    else
      relpos::cp_async_wait<0>();
    __syncthreads();
    const int from = kThreads - 1 - thread();  // another thread's, to need the barriers
    reinterpret_cast<float4*>(p.out)[step * kThreads + from] =
        reinterpret_cast<const float4*>(smem)[step % 2 * kThreads + from];
    if (p.fault != "refills a buffer in use") __syncthreads();
  }
  if (one_too_few && !in_flight) relpos::cp_async_wait<0>();
}

// out[linear thread] = the block and thread coordinates it sees.
__global__ void coordinates_kernel(Params p) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  __syncthreads();
  int* const out = static_cast<int*>(p.out) + (block * 24 + t) * 6;
  const uint3 seen[] = {blockIdx, threadIdx};
  for (int i = 0; i < 2; ++i) {
    out[3 * i] = static_cast<int>(seen[i].z);
    out[3 * i + 1] = static_cast<int>(seen[i].y);
    out[3 * i + 2] = static_cast<int>(seen[i].x);
  }
}

__global__ void empty_kernel(Params) {}

struct Config {
  void (*kernel)(Params);
  dim3 grid, block;
  size_t shared;
};

const std::map<std::string_view, Config> kKernels{
    {"sum", {sum_kernel, 3, 128, 16}},
    {"rotate", {rotate_kernel, 1, 96, 96 * 4}},
    {"wait", {wait_kernel, 2, 64, 0}},
    {"warp", {warp_kernel, 1, 64, 0}},
    {"matmul float16", {matmul_kernel<__half>, 1, 32, 24 * 32}},
    {"matmul bfloat16", {matmul_kernel<__nv_bfloat16>, 1, 32, 24 * 32}},
    {"exp2", {exp2_kernel, 1, 8, 0}},
    {"ldmatrix", {ldmatrix_kernel, 1, 32, 512}},
    {"copy", {copy_kernel, 1, 64, 2048}},
    {"coordinates", {coordinates_kernel, dim3(2, 3, 2), dim3(4, 3, 2), 0}},
    {"largest launch", {empty_kernel, dim3(1, 1, 1), 1024, 227 * 1024}},
    {"too many threads", {empty_kernel, 1, dim3(1024, 2), 0}},
    {"grid too high", {empty_kernel, dim3(1, 65536), 32, 0}},
    {"empty grid", {empty_kernel, dim3(0), 32, 0}},
    {"too much shared memory", {empty_kernel, 1, 32, 227 * 1024 + 1}},
};

}  // namespace

// The shim's complaint, or null.
extern "C" const char* run(const char* kernel, const void* in, void* out, int n, const char* fault) {
  static std::string complaint;
  try {
    const Config& c = kKernels.at(kernel);
    simt::reset_stats();
    simt::launch(c.kernel, c.grid, c.block, c.shared, Params{in, out, n, fault});
  } catch (const std::exception& e) {
    complaint = e.what();
    return complaint.c_str();
  }
  return nullptr;
}
