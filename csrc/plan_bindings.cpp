// plan_bindings.cpp - the planner for Python. No torch header, so it builds in seconds and runs anywhere.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "plan.h"
#include "plan_attention.h"
#include "sizes.h"

namespace py = pybind11;

namespace relpos {
namespace {

struct NamedPlan {
  std::string kernel, refusal;
  int block_rows, threads;
  int64_t shared_bytes, grid;
};

int bytes_of(const std::string& dtype) {
  static const std::map<std::string, int> bytes = {{"float16", 2}, {"bfloat16", 2}, {"float32", 4}, {"float64", 8}};
  const auto found = bytes.find(dtype);
  if (found == bytes.end()) throw std::invalid_argument("dtype must be a floating point name, got " + dtype);
  return found->second;
}

Shape shape_of(int64_t groups, const std::vector<int64_t>& q_size, const std::vector<int64_t>& k_size, int head_dim,
               int num_prefix_tokens) {
  if (const std::string fault = fault_of(q_size, k_size, head_dim, num_prefix_tokens); !fault.empty())
    throw std::invalid_argument(fault);
  Shape s;
  set_grid(s, q_size.data(), k_size.data(), static_cast<int>(q_size.size()));
  s.groups = groups;
  s.D = head_dim;
  s.prefix = num_prefix_tokens;
  return s;
}

// Of every axis: k_shift, origin, origin_step.
std::vector<std::tuple<int, int, int>> origins(const std::vector<int64_t>& q_size, const std::vector<int64_t>& k_size) {
  const Shape s = shape_of(1, q_size, k_size, 8, 0);
  std::vector<std::tuple<int, int, int>> found;
  for (const Axis& axis : s.axis)
    if (axis.rows) found.emplace_back(axis.k_shift, axis.origin, axis.origin_step);
  return found;
}

NamedPlan logits(const std::string& direction, const std::string& dtype, int64_t groups,
                 const std::vector<int64_t>& q_size, const std::vector<int64_t>& k_size, int head_dim,
                 int num_prefix_tokens, int arch) {
  if (direction != "forward" && direction != "backward")
    throw std::invalid_argument("direction must be forward or backward, got " + direction);
  const Direction way = direction == "forward" ? Direction::kForward : Direction::kBackward;
  const Shape s = shape_of(groups, q_size, k_size, head_dim, num_prefix_tokens);
  const LogitsPlan p = plan_logits(way, s, bytes_of(dtype), arch);
  return {p.kernel(way), p.refusal, p.block_rows, kThreads, p.shared_bytes, p.grid};
}

NamedPlan attention(const std::string& kernel, const std::string& dtype, int64_t groups,
                    const std::vector<int64_t>& q_size, const std::vector<int64_t>& k_size, int head_dim,
                    int num_prefix_tokens, int arch, double scale) {
  static const std::map<std::string, AttentionKernel> kernels = {
      {"forward", AttentionKernel::kForward},
      {"forward_window", AttentionKernel::kForwardWindow},
      {"forward_sm90", AttentionKernel::kForwardSm90},
      {"backward_queries", AttentionKernel::kBackwardQueries},
      {"backward_queries_sm90", AttentionKernel::kBackwardQueriesSm90},
      {"backward_keys", AttentionKernel::kBackwardKeys},
      {"backward_keys_sm90", AttentionKernel::kBackwardKeysSm90},
      {"backward_window", AttentionKernel::kBackwardWindow}};
  const auto found = kernels.find(kernel);
  if (found == kernels.end())
    throw std::invalid_argument(
        "kernel must be forward, backward_queries, backward_keys, each also with _sm90, forward_window or "
        "backward_window, got " +
        kernel);
  const Shape s = shape_of(groups, q_size, k_size, head_dim, num_prefix_tokens);
  const AttentionPlan p = plan_attention(found->second, s, bytes_of(dtype), arch, scale);
  return {p.kernel(found->second), p.refusal, p.block_rows, p.threads, p.shared_bytes, p.grid};
}

}  // namespace
}  // namespace relpos

PYBIND11_MODULE(_plan, m) {
  using relpos::NamedPlan;
  m.doc() = "Which kernel, tile and shared memory a problem gets on an architecture.";
  py::class_<NamedPlan>(m, "Plan")
      .def_readonly("kernel", &NamedPlan::kernel)
      .def_readonly("refusal", &NamedPlan::refusal)
      .def_readonly("block_rows", &NamedPlan::block_rows)
      .def_readonly("threads", &NamedPlan::threads)
      .def_readonly("shared_bytes", &NamedPlan::shared_bytes)
      .def_readonly("grid", &NamedPlan::grid);
  m.def("origins", &relpos::origins, py::arg("q_size"), py::arg("k_size"));
  m.def("plan_logits", &relpos::logits, py::arg("direction"), py::arg("dtype"), py::arg("groups"), py::arg("q_size"),
        py::arg("k_size"), py::arg("head_dim"), py::arg("num_prefix_tokens"), py::arg("arch"));
  m.def("plan_attention", &relpos::attention, py::arg("kernel"), py::arg("dtype"), py::arg("groups"), py::arg("q_size"),
        py::arg("k_size"), py::arg("head_dim"), py::arg("num_prefix_tokens"), py::arg("arch"), py::arg("scale"));
}
