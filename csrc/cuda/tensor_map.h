// tensor_map.h - a tensor in global memory as TMA sees it: up to five axes, copied box by box into shared memory.
//
//   const TensorMap map = make_tensor_map({base, 2, 2, {D, rows}, {2, D * 2}, {64, 128}, Swizzle::k128});
//
// Kernels take it inside their `const __grid_constant__` parameters. What lies outside the tensor reads as zero.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "swizzle.h"

#ifndef RELPOS_EMULATE
#include <cuda.h>

#include "runtime.h"
#endif

namespace relpos {

struct Tiling {  // axis 0 is contiguous
  const void* base;
  int element_bytes;  // 2 or 4
  int rank;           // 1 to 5
  int64_t size[5];    // elements
  int64_t stride[5];  // bytes; of axis 0 not used
  int box[5];         // elements
  Swizzle swizzle;

  int box_bytes() const {
    int bytes = element_bytes;
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    return bytes;
  }
};

// What the driver refuses with no more than "invalid argument"; and a swizzled box narrower than its span, which would
// leave holes in a matrix of wgmma.
inline void check_tiling(const Tiling& t) {
  const auto check = [](bool fine, const std::string& wants, int64_t got) {
    if (!fine) throw std::runtime_error("relpos_cuda: TensorMap: " + wants + ", got " + std::to_string(got));
  };
  check(t.element_bytes == 2 || t.element_bytes == 4, "elements must have 2 or 4 bytes", t.element_bytes);
  check(1 <= t.rank && t.rank <= 5, "1 to 5 axes are possible", t.rank);
  const auto base = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.base) % 16);
  check(t.base != nullptr && base == 0, "the base must be aligned to 16 bytes", base);
  for (int i = 0; i < t.rank; ++i) {
    const std::string of = " of axis " + std::to_string(i);
    check(1 <= t.size[i] && t.size[i] <= int64_t{1} << 32, "size" + of + " must be 1 to 2^32", t.size[i]);
    check(1 <= t.box[i] && t.box[i] <= 256, "box" + of + " must be 1 to 256", t.box[i]);
    if (i == 0) continue;
    check(t.stride[i] % 16 == 0, "stride" + of + " must be a multiple of 16 bytes", t.stride[i]);
    check(0 <= t.stride[i] && t.stride[i] < int64_t{1} << 40, "stride" + of + " must be below 2^40", t.stride[i]);
  }
  const int row = t.box[0] * t.element_bytes, span = span_of(t.swizzle);
  check(row % 16 == 0, "a row of the box must be a multiple of 16 bytes", row);
  check(t.swizzle == Swizzle::kNone || row == span, "a row of this swizzle has " + std::to_string(span) + " bytes",
        row);
}

#ifdef RELPOS_EMULATE
using TensorMap = Tiling;  // tests/simt/sm90.h copies by it

inline TensorMap make_tensor_map(const Tiling& t) {
  check_tiling(t);
  return t;
}
#else
struct TensorMap {
  CUtensorMap driver;
};

// The driver is asked through the runtime, so that the library also loads where there is none.
inline TensorMap make_tensor_map(const Tiling& t) {
  check_tiling(t);
  static void* const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    RELPOS_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    RELPOS_CHECK(found == cudaDriverEntryPointSuccess, "this driver has no cuTensorMapEncodeTiled: it needs CUDA 12");
    return function;
  }();
  constexpr CUtensorMapSwizzle kSwizzle[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  cuuint64_t size[5] = {}, stride[4] = {};
  cuuint32_t box[5] = {}, step[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < t.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(t.size[i]), box[i] = static_cast<cuuint32_t>(t.box[i]);
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(t.stride[i]);
  }
  TensorMap map;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map.driver, t.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32,
      static_cast<cuuint32_t>(t.rank), const_cast<void*>(t.base), size, stride, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzle[static_cast<int>(t.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  RELPOS_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(result));
  return map;
}
#endif

}  // namespace relpos
