// device.h - from tensors to the device that they are on.
#pragma once
#include "../checks.h"
#include "../plan.h"
#include "runtime.h"
#ifndef RELPOS_EMULATE
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace relpos {

#ifdef RELPOS_EMULATE
class OnDevice : public Launcher {
 public:
  explicit OnDevice(const Tensor&) {}
};
#else
// libtorch_cuda is looked up and not linked, so that the library also loads beside a PyTorch without CUDA.
inline cudaStream_t current_stream_of(const Tensor& t) {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const CurrentStream current_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  RELPOS_CHECK(current_stream != nullptr, "this PyTorch has no CUDA");
  void* stream = nullptr;
  RELPOS_CHECK(current_stream(t.get_device_index(), &stream) == 0, "no CUDA stream on device ", t.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

inline int arch_of(const Tensor& t) {
  int major = 0, minor = 0;
  RELPOS_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index()));
  RELPOS_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device_index()));
  return major * 10 + minor;
}

// The device of the tensors, made current, with its stream.
class OnDevice : public Launcher {
 public:
  explicit OnDevice(const Tensor& t) : OnDevice(t, arch_of(t)) {}

 private:
  OnDevice(const Tensor& t, int arch)
      : Launcher(current_stream_of(t), arch, shared_limits(arch).per_block), guard_(t.get_device_index()) {}

  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

}  // namespace relpos
