// runtime.h - the little of the CUDA runtime that launchers and kernels use. Tests replace it (RELPOS_EMULATE) to run
// the same kernels and the same launchers on the CPU. No tensor is here: those headers take seconds to compile.
#pragma once
#ifdef RELPOS_EMULATE
#include "runtime_emulated.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../errors.h"

#define RELPOS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define RELPOS_DYNAMIC_SHARED_1024(name) \
  extern __shared__ __align__(1024) unsigned char name[]  // repeat of Swizzle::k128

namespace relpos {

#define RELPOS_CUDA_CHECK(call)                                                                   \
  do {                                                                                            \
    const cudaError_t error = (call);                                                             \
    RELPOS_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error), " in ", #call); \
  } while (0)

// What it takes to launch kernels on a stream of the current device.
class Launcher {
 public:
  // `most_shared`: bytes of shared memory that a block of the device may have.
  Launcher(cudaStream_t stream, int arch, int64_t most_shared)
      : stream_(stream), arch_(arch), most_shared_(static_cast<int>(most_shared)) {}
  int arch() const { return arch_; }

  template <typename Params>
  void launch(void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes, const Params& params) const {
    constexpr int64_t kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking)  // the same for all: another thread may ask between this and the launch
      RELPOS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_));
    void* arguments[] = {const_cast<Params*>(&params)};
    RELPOS_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments,
                                       static_cast<size_t>(shared_bytes), stream_));
  }

 private:
  cudaStream_t stream_;
  int arch_, most_shared_;
};

}  // namespace relpos
#endif
