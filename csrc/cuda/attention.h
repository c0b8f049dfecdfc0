// attention.h - what the launchers of the attention share: checks, params, runtime values that become template values.
#pragma once
#include "../params.h"
#include "dispatch.h"

namespace relpos {

// Kernels read and write rows by vectors of 16 bytes.
template <typename Data>
TokenRows<Data> aligned_rows(const char* name, Data data, const QueryStrides& strides, int64_t bytes) {
  const bool aligned = is_aligned(data, 16) && strides.batch * bytes % 16 == 0 && strides.head * bytes % 16 == 0 &&
                       strides.row * bytes % 16 == 0;
  RELPOS_CHECK(aligned, "every row of ", name, " must start at a multiple of 16 bytes");
  return {data, strides.batch, strides.head, strides.row};
}
inline InRows in_rows(const char* name, const Tensor& t, const Tensor& q, const Shape& s, int64_t tokens) {
  return aligned_rows(name, t.const_data_ptr(), check_tokens(name, t, q, s, tokens), t.element_size());
}
inline OutRows out_rows(const char* name, const Tensor& t, const Tensor& q, const Shape& s, int64_t tokens) {
  return aligned_rows(name, t.mutable_data_ptr(), check_tokens(name, t, q, s, tokens), t.element_size());
}

inline int bytes_of(const Tensor& t) { return static_cast<int>(t.element_size()); }

inline void fill(AttentionParams& p, const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& table, const Tensor& index, double scale) {
  p.shape = s;
  p.q = in_rows("q", q, q, s, s.M());
  p.k = in_rows("k", k, q, s, s.N());
  p.v = in_rows("v", v, q, s, s.N());
  RELPOS_CHECK(is_aligned(table.const_data_ptr(), 16), "table must start at a multiple of 16 bytes");
  p.table = table.const_data_ptr();
  p.index = index.const_data_ptr<int32_t>();
  p.scale = static_cast<float>(scale);
  p.by_heads = FastDiv(s.heads);
  p.by_keys_h = FastDiv(s.axis[kH].keys);
}

inline void obey(AttentionParams& p, const AttentionPlan& plan) {
  RELPOS_CHECK(plan.refusal.empty(), plan.refusal);
  p.keys = plan.keys;
  p.block_rows = plan.block_rows;
  p.by_tiles = FastDiv(static_cast<int>(plan.grid / p.shape.groups));
}

template <int V>
using Int = std::integral_constant<int, V>;

// f(Type<T>, Int<D>) for the dtype of q and the head dimension of the kernel.
template <typename F>
void dispatch_attention(ScalarType dtype, int head_dim, F&& f) {
  const auto with_dtype = [&](auto d) {
    if (dtype == ScalarType::Half) return f(Type<__half>{}, d);
    if (dtype == ScalarType::BFloat16) return f(Type<__nv_bfloat16>{}, d);
    if (dtype == ScalarType::Float) return f(Type<float>{}, d);
    RELPOS_CHECK(false, "no attention kernel for ", name_of(dtype), "; built for float16, bfloat16 and float32");
  };
  switch (head_dim) {
    case 64:
      return with_dtype(Int<64>{});
    case 80:
      return with_dtype(Int<80>{});
    case 96:
      return with_dtype(Int<96>{});
    case 112:
      return with_dtype(Int<112>{});
    case 128:
      return with_dtype(Int<128>{});
    default:
      RELPOS_CHECK(false, "no attention kernel for the head dimension ", head_dim);
  }
}

// f(Int<blocks>, Int<one line per tile>) for the tiles of keys that `tile_keys` makes for this dtype.
template <typename T, typename F>
void dispatch_keys(const KeyTiling& keys, F&& f) {
  if constexpr (sizeof(T) == 4)
    f(Int<kMaxKeyBlocks / 2>{}, Int<false>{});
  else if (!keys.one_line)
    f(Int<kMaxKeyBlocks>{}, Int<false>{});
  else if (keys.blocks == 6)
    f(Int<6>{}, Int<true>{});
  else
    f(Int<kMaxKeyBlocks>{}, Int<true>{});
}

}  // namespace relpos
