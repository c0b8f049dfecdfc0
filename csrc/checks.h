// checks.h - what every op verifies before it touches memory, for the CPU and the CUDA library alike.
//
// Python has already refused bad input with friendlier words; these guard direct callers of the ops. What `index` says
// is read by the device, and trusted there; on the CPU it is checked where it is read (cpu/tiles.h).
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"
#include "sizes.h"

namespace relpos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    default:
      return "an unsupported dtype";
  }
}

inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

// "contiguous [16, 8]"
inline std::string words_of(const Tensor& t) {
  std::string words = t.is_contiguous() ? "contiguous [" : "strided [";
  for (int64_t i = 0; i < t.dim(); ++i) words += (i ? ", " : "") + std::to_string(t.size(i));
  return words + "]";
}

inline void check_device(const char* name, const Tensor& t, const Tensor& q) {
  RELPOS_CHECK(t.is_cuda() == q.is_cuda() && t.get_device_index() == q.get_device_index(), name, " must be on ",
               device_of(q), " like q, got ", device_of(t));
}

// A contiguous tensor of this dtype and size, on the device of q.
inline void check_buffer(const char* name, const Tensor& t, const Tensor& q, ScalarType dtype, int64_t numel) {
  check_device(name, t, q);
  RELPOS_CHECK(t.scalar_type() == dtype, name, " must be ", name_of(dtype), ", got ", name_of(t.scalar_type()));
  RELPOS_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
  RELPOS_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// Where the rows of q are, in elements; the last axis is contiguous.
struct QueryStrides {
  int64_t batch = 0, head = 0, row = 0;
};

// Reads sizes and strides of q, [B, heads, M, D] or [G, M, D], and checks all that must agree with them.
inline Shape check_problem(const Tensor& q, const Tensor& table, const Tensor& index,
                           const std::vector<int64_t>& q_size, const std::vector<int64_t>& k_size, int64_t prefix,
                           QueryStrides& strides) {
  const int64_t dim = q.dim();
  RELPOS_CHECK(dim == 3 || dim == 4, "q must be [B, heads, S, D] or [B * heads, S, D], got ", dim, " dimensions");
  const std::string fault = fault_of(q_size, k_size, q.size(-1), prefix);
  RELPOS_CHECK(fault.empty(), fault);
  Shape s;
  set_grid(s, q_size.data(), k_size.data(), static_cast<int>(q_size.size()));
  RELPOS_CHECK(index_length(s) < kCountEnd, "the axes are too long for a 32-bit index");
  s.groups = dim == 4 ? q.size(0) * q.size(1) : q.size(0);
  s.heads = dim == 4 && q.size(1) > 0 ? static_cast<int>(q.size(1)) : 1;
  s.D = static_cast<int>(q.size(-1));
  s.prefix = static_cast<int>(prefix);
  strides = {q.stride(0), dim == 4 ? q.stride(1) : 0, q.stride(dim - 2)};
  RELPOS_CHECK(q.size(dim - 2) == s.M(), "q has ", q.size(dim - 2), " tokens, the grid has ", s.M());
  RELPOS_CHECK(s.D == 1 || q.stride(-1) == 1 || q.numel() == 0, "the last axis of q must be contiguous");
  RELPOS_CHECK(table.dim() == 2 && table.size(0) == s.table_rows() && table.size(1) == s.D && table.is_contiguous(),
               "table must be contiguous [", s.table_rows(), ", ", s.D, "], got ", words_of(table));
  RELPOS_CHECK(table.scalar_type() == q.scalar_type(), "table is ", name_of(table.scalar_type()), ", q is ",
               name_of(q.scalar_type()));
  check_device("table", table, q);
  check_buffer("index", index, q, ScalarType::Int, index_length(s));
  return s;
}

// Where the rows of t, a tensor like q but with so many tokens, are.
inline QueryStrides check_tokens(const char* name, const Tensor& t, const Tensor& q, const Shape& s, int64_t tokens) {
  const int64_t dim = q.dim();
  RELPOS_CHECK(t.dim() == dim, name, " has ", t.dim(), " dimensions, q has ", dim);
  for (int64_t i = 0; i < dim - 2; ++i)
    RELPOS_CHECK(t.size(i) == q.size(i), name, " must have size ", q.size(i), " like q in dimension ", i, ", got ",
                 t.size(i));
  RELPOS_CHECK(t.size(dim - 2) == tokens, name, " must have ", tokens, " tokens, got ", t.size(dim - 2));
  RELPOS_CHECK(t.size(dim - 1) == s.D, name, " must have the head dimension of q, ", s.D, ", got ", t.size(dim - 1));
  RELPOS_CHECK(s.D == 1 || t.stride(dim - 1) == 1 || t.numel() == 0, "the last axis of ", name, " must be contiguous");
  RELPOS_CHECK(t.scalar_type() == q.scalar_type(), name, " is ", name_of(t.scalar_type()), ", q is ",
               name_of(q.scalar_type()));
  check_device(name, t, q);
  return {t.stride(0), dim == 4 ? t.stride(1) : 0, t.stride(dim - 2)};
}

inline int64_t row_offset(const Shape& s, const QueryStrides& strides, int64_t group, int64_t m) {
  return group / s.heads * strides.batch + group % s.heads * strides.head + m * strides.row;
}

}  // namespace relpos
