// runtime_emulated.h - csrc/cuda/runtime.h for the CPU: the same launchers and kernels, run by the shim.
#pragma once
#include <cstdlib>

#include "../../csrc/errors.h"
#include "sm90.h"

namespace relpos {

inline uint4 load_stream(const void* p, simt::Site site = simt::Site::current()) {
  if (reinterpret_cast<uintptr_t>(p) % 16) simt::fail(site, "load_stream: misaligned address");
  return *static_cast<const uint4*>(p);
}

inline void prefetch_l2(const void* p) {  // where a GPU would do nothing, there is no memory: that is a mistake
  static_cast<void>(*static_cast<const volatile char*>(p));
}

inline int64_t afresh(int64_t x) { return x; }
template <int R>
void pin(uint32_t (&)[R]) {}

// Stands for a GPU of compute capability RELPOS_EMULATED_ARCH (80 if unset).
class Launcher {
 public:
  int arch() const {
    const char* arch = std::getenv("RELPOS_EMULATED_ARCH");
    return arch ? std::atoi(arch) : 80;
  }

  template <typename Params>
  void launch(void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes, const Params& params) const {
    simt::launch(kernel, grid, dim3(threads), static_cast<size_t>(shared_bytes), params);
  }
};

}  // namespace relpos
