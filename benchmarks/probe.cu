// probe.cu - every function of csrc/cuda/tile/ptx.cuh that all architectures have, by itself, for a GPU (nvcc) and for
// the emulator (tests/simt); but named barriers, which are in tests/simt/selftest_sm90.cuh with what Hopper added.
//
//   out[lane, kOut words] = the instruction, given in[lane, kIn words]
//
//   grid     one block of one warp.
//   shared   ldmatrix, cp.async: 32 rows of 16 bytes, row `lane` written by that lane.
//   barriers one __syncwarp, between writing the rows and ldmatrix.
//
// benchmarks/gpu_probe.py compiles it both ways, fills `in` and compares the bits of `out`.
#include <cstring>
#include <string>

#include "../csrc/cuda/tile/ptx.cuh"

namespace {

struct Params {
  const uint32_t* in;
  uint32_t* out;
};

enum class Load { kX4, kX4Trans, kX2, kX2Trans };

template <Load LOAD>
struct Ldmatrix {
  static constexpr int kIn = 4, kOut = LOAD == Load::kX2 || LOAD == Load::kX2Trans ? 2 : 4;

  static __device__ void run(const uint32_t* in, uint32_t* out) {
    RELPOS_DYNAMIC_SHARED(shared);
    uint32_t* const row = reinterpret_cast<uint32_t*>(shared) + threadIdx.x % 32 * kIn;
    for (int i = 0; i < kIn; ++i) row[i] = in[i];
    __syncwarp();
    uint32_t r[kOut];
    if constexpr (LOAD == Load::kX4) relpos::ldmatrix_x4(r, row);
    if constexpr (LOAD == Load::kX4Trans) relpos::ldmatrix_x4_trans(r, row);
    if constexpr (LOAD == Load::kX2) relpos::ldmatrix_x2(r, row);
    if constexpr (LOAD == Load::kX2Trans) relpos::ldmatrix_x2_trans(r, row);
    for (int i = 0; i < kOut; ++i) out[i] = r[i];
  }
};

template <typename T>
struct Mma {
  static constexpr int kIn = 10, kOut = 4;  // a, b, d; d

  static __device__ void run(const uint32_t* in, uint32_t* out) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
    float d[4];
    memcpy(d, in + 6, sizeof d);
    relpos::mma_m16n8k16<T>(d, a, b);
    memcpy(out, d, sizeof d);
  }
};

struct Exp2 {
  static constexpr int kIn = 1, kOut = 1;

  static __device__ void run(const uint32_t* in, uint32_t* out) {
    float x;
    memcpy(&x, in, sizeof x);
    const float y = relpos::exp2_approx(x);
    memcpy(out, &y, sizeof y);
  }
};

struct LoadStream {
  static constexpr int kIn = 4, kOut = 4;

  static __device__ void run(const uint32_t* in, uint32_t* out) {
    const uint4 v = relpos::load_stream(in);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  }
};

struct CpAsync {
  static constexpr int kIn = 8, kOut = 4;  // 16 bytes, whether to copy them

  static __device__ void run(const uint32_t* in, uint32_t* out) {
    RELPOS_DYNAMIC_SHARED(shared);
    uint32_t* const row = reinterpret_cast<uint32_t*>(shared) + threadIdx.x % 32 * kOut;
    relpos::cp_async_16(row, in, in[4] % 2 != 0);
    relpos::cp_async_commit();
    relpos::cp_async_wait<0>();
    for (int i = 0; i < kOut; ++i) out[i] = row[i];
  }
};

template <typename Probe>
__global__ void __launch_bounds__(32) probe_kernel(const Params p) {
  Probe::run(p.in + threadIdx.x * Probe::kIn, p.out + threadIdx.x * Probe::kOut);
}

struct Entry {
  const char* name;
  void (*kernel)(Params);
  int in_words, out_words;  // of all lanes
};
template <typename Probe>
Entry entry(const char* name) {
  return {name, probe_kernel<Probe>, 32 * Probe::kIn, 32 * Probe::kOut};
}
const Entry kProbes[] = {
    entry<Ldmatrix<Load::kX4>>("ldmatrix_x4"),
    entry<Ldmatrix<Load::kX4Trans>>("ldmatrix_x4_trans"),
    entry<Ldmatrix<Load::kX2>>("ldmatrix_x2"),
    entry<Ldmatrix<Load::kX2Trans>>("ldmatrix_x2_trans"),
    entry<Mma<__half>>("mma_m16n8k16 float16"),
    entry<Mma<__nv_bfloat16>>("mma_m16n8k16 bfloat16"),
    entry<Exp2>("exp2_approx"),
    entry<LoadStream>("load_stream"),
    entry<CpAsync>("cp_async_16"),
};
constexpr size_t kShared = 32 * 16;

#ifdef RELPOS_EMULATE
std::string launch(const Entry& e, const uint32_t* in, uint32_t* out) try {
  simt::launch(e.kernel, 1, 32, kShared, Params{in, out});
  return "";
} catch (const std::exception& error) {
  return error.what();
}
#else
std::string launch(const Entry& e, const uint32_t* in, uint32_t* out) {
  const size_t in_bytes = e.in_words * sizeof *in, out_bytes = e.out_words * sizeof *out;
  uint32_t *in_device = nullptr, *out_device = nullptr;
  Params p{};
  void* arguments[] = {&p};
  cudaError_t error = cudaSuccess;
  const auto ok = [&](cudaError_t now) { return (error = now) == cudaSuccess; };
  const bool done =
      ok(cudaMalloc(&in_device, in_bytes)) && ok(cudaMalloc(&out_device, out_bytes)) &&
      ok(cudaMemcpy(in_device, in, in_bytes, cudaMemcpyHostToDevice)) &&
      ok(cudaMemcpy(out_device, out, out_bytes, cudaMemcpyHostToDevice)) && (p = {in_device, out_device}, true) &&
      ok(cudaLaunchKernel(reinterpret_cast<const void*>(e.kernel), dim3(1), dim3(32), arguments, kShared, nullptr)) &&
      ok(cudaMemcpy(out, out_device, out_bytes, cudaMemcpyDeviceToHost));  // waits for the kernel
  cudaFree(in_device), cudaFree(out_device);
  return done ? "" : cudaGetErrorString(error);
}
#endif

}  // namespace

// The complaint, or null. Sizes in words.
extern "C" __attribute__((visibility("default"))) const char* probe(const char* name, const uint32_t* in, int in_words,
                                                                    uint32_t* out, int out_words) {
  static std::string complaint;
  complaint = std::string("no probe ") + name;
  for (const Entry& e : kProbes)
    if (std::strcmp(name, e.name) == 0)
      complaint = e.in_words != in_words || e.out_words != out_words ? "sizes differ" : launch(e, in, out);
  return complaint.empty() ? nullptr : complaint.c_str();
}
