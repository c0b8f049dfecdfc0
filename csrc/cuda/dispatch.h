// dispatch.h - runtime dtypes become template types, here and nowhere else.
#pragma once
#include "device.h"

namespace relpos {

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline bool rows_are_aligned(const void* data, const QueryStrides& strides, int64_t bytes_of_element) {
  return is_aligned(data, 16) && strides.batch * bytes_of_element % 16 == 0 &&
         strides.head * bytes_of_element % 16 == 0 && strides.row * bytes_of_element % 16 == 0;
}

// Kernels read rows of the table by vectors of 16 bytes.
inline void check_table_alignment(const Tensor& table) {
  RELPOS_CHECK(is_aligned(table.const_data_ptr(), 16), "table must start at a multiple of 16 bytes");
}

#if defined(RELPOS_WITHOUT_FLOAT16)  // fewer kernels, for tests that compile them many times
constexpr bool kHasFloat16 = false;
#else
constexpr bool kHasFloat16 = true;
#endif
constexpr const char* kDtypes = kHasFloat16 ? "float16, bfloat16 and float32" : "bfloat16 and float32";

template <typename T>
struct Type {
  using type = T;
};

// f(Type<T>) for the dtype of q.
template <typename F>
void dispatch_dtype(ScalarType q, F&& f) {
  if (q == ScalarType::Float) return f(Type<float>{});
  if (q == ScalarType::BFloat16) return f(Type<__nv_bfloat16>{});
  if constexpr (kHasFloat16)
    if (q == ScalarType::Half) return f(Type<__half>{});
  RELPOS_CHECK(false, "no kernel for ", name_of(q), "; built for ", kDtypes);
}

// f(Type<S>, Type<T>) for the dtypes of the logits and of q: the same, or float32 logits with half precision q.
template <typename F>
void dispatch_dtypes(ScalarType logits, ScalarType q, F&& f) {
  if (logits == ScalarType::Float && q == ScalarType::Float) return f(Type<float>{}, Type<float>{});
  if (logits == ScalarType::BFloat16 && q == ScalarType::BFloat16)
    return f(Type<__nv_bfloat16>{}, Type<__nv_bfloat16>{});
  if (logits == ScalarType::Float && q == ScalarType::BFloat16) return f(Type<float>{}, Type<__nv_bfloat16>{});
  if constexpr (kHasFloat16) {
    if (logits == ScalarType::Half && q == ScalarType::Half) return f(Type<__half>{}, Type<__half>{});
    if (logits == ScalarType::Float && q == ScalarType::Half) return f(Type<float>{}, Type<__half>{});
  }
  RELPOS_CHECK(false, "no kernel for ", name_of(logits), " logits with ", name_of(q), " q; built for ", kDtypes,
               ", and float32 logits with half precision q");
}

}  // namespace relpos
