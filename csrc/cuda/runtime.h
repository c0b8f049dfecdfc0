// runtime.h - the little of the CUDA runtime that launchers and kernels use. Tests replace it (RELPOS_EMULATE) to run
// the same kernels and the same launchers on the CPU.
#pragma once
#ifdef RELPOS_EMULATE
#include "runtime_emulated.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

#define RELPOS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define RELPOS_DYNAMIC_SHARED_1024(name) \
  extern __shared__ __align__(1024) unsigned char name[]  // repeat of Swizzle::k128

namespace relpos {

#define RELPOS_CUDA_CHECK(call)                                                                   \
  do {                                                                                            \
    const cudaError_t error = (call);                                                             \
    RELPOS_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error), " in ", #call); \
  } while (0)

// The device of the tensors, made current, with its stream. libtorch_cuda is looked up and not linked, so that the
// library also loads beside a PyTorch without CUDA.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    using CurrentStream = AOTITorchError (*)(int32_t, void**);
    static const CurrentStream current_stream = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
    }();
    RELPOS_CHECK(current_stream != nullptr, "this PyTorch has no CUDA");
    void* stream = nullptr;
    RELPOS_CHECK(current_stream(t.get_device_index(), &stream) == 0, "no CUDA stream on device ", t.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
    int major = 0, minor = 0;
    RELPOS_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index()));
    RELPOS_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device_index()));
    arch_ = major * 10 + minor;
  }
  int arch() const { return arch_; }

  template <typename Params>
  void launch(void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes, const Params& params) const {
    constexpr int64_t kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking)
      RELPOS_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    void* arguments[] = {const_cast<Params*>(&params)};
    RELPOS_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments,
                                       static_cast<size_t>(shared_bytes), stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int arch_ = 0;
};

}  // namespace relpos
#endif
