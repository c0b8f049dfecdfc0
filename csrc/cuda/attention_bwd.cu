// attention_bwd.cu - the backward of the attention on the GPU: check, fill params, plan, launch one kernel after another.
#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "attention_bwd_keys.cuh"
#include "attention_bwd_queries.cuh"
#include "table_grad.h"

#ifndef RELPOS_OPS
#define RELPOS_OPS relpos_cuda
#define RELPOS_DEVICE CUDA
#endif

namespace relpos {
namespace {

void launch_queries(const OnDevice& device, AttentionBwdParams p, const Tensor& q) {
  const AttentionPlan plan =
      plan_attention(AttentionKernel::kBackwardQueries, p.shape, bytes_of(q), device.arch(), p.scale);
  obey(p, plan);
  dispatch_attention(q.scalar_type(), plan.head_dim, [&](auto type, auto d) {
    using T = typename decltype(type)::type;
    dispatch_keys<T>(plan.keys, [&](auto blocks, auto one_line) {
      device.launch(attention_bwd_queries_kernel<T, d(), blocks(), one_line()>, dim3(static_cast<unsigned>(plan.grid)),
                    plan.threads, plan.shared_bytes, p);
    });
  });
}

void launch_keys(const OnDevice& device, AttentionBwdParams p, const Tensor& q) {
  const AttentionPlan plan =
      plan_attention(AttentionKernel::kBackwardKeys, p.shape, bytes_of(q), device.arch(), p.scale);
  obey(p, plan);
  dispatch_attention(q.scalar_type(), plan.head_dim, [&](auto type, auto d) {
    using T = typename decltype(type)::type;
    device.launch(attention_bwd_keys_kernel<T, d()>, dim3(static_cast<unsigned>(plan.grid)), plan.threads,
                  plan.shared_bytes, p);
  });
}

// What the first kernel leaves for the second: csrc/plan_attention.h.
void use_cache(AttentionBwdParams& p, const Tensor& q, const std::optional<Tensor>& columns,
               const std::optional<Tensor>& lines) {
  RELPOS_CHECK(columns && lines, "dk and dv need the work spaces columns and lines");
  const Shape& s = p.shape;
  const KeySlots slots(s);
  const ScalarType type = bytes_of(q) == 2 ? ScalarType::Half : ScalarType::Float;
  check_buffer("columns", *columns, q, type, s.rows() * slots.line);
  check_buffer("lines", *lines, q, ScalarType::Float, s.groups * (slots.lines(s) + 1) * padded_queries(s));
  p.columns = columns->mutable_data_ptr();
  p.lines = lines->mutable_data_ptr<float>();
}

void attention_bwd(std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv,
                   std::optional<Tensor> dtable, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const Tensor& table, const Tensor& index,
                   const std::optional<Tensor>& factors, const std::optional<Tensor>& partials,
                   const std::optional<Tensor>& columns, const std::optional<Tensor>& lines,
                   std::vector<int64_t> q_size, std::vector<int64_t> k_size, int64_t prefix, double scale) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  check_buffer("lse", lse, q, ScalarType::Float, s.rows());
  if (dtable) check_buffer("dtable", *dtable, q, ScalarType::Float, table.numel());
  if (dtable) check_work_spaces(s, q, factors, partials);
  AttentionBwdParams p;
  fill(p, s, q, k, v, table, index, scale);
  p.grad = in_rows("grad", grad, q, s, s.M());
  p.out = in_rows("out", out, q, s, s.M());
  p.lse = lse.const_data_ptr<float>();
  if (dq) p.dq = out_rows("dq", *dq, q, s, s.M());
  if (dk) p.dk = out_rows("dk", *dk, q, s, s.N());
  if (dv) p.dv = out_rows("dv", *dv, q, s, s.N());
  if (dk || dv) use_cache(p, q, columns, lines);
  p.dfactors = dtable ? factors->mutable_data_ptr<float>() : nullptr;

  const OnDevice device(q);
  if (s.groups > 0) {
    launch_queries(device, p, q);
    if (dk || dv) launch_keys(device, p, q);
  }
  if (dtable) launch_table_gradient(device, s, strides, q, index, *factors, *partials, *dtable);
}

STABLE_TORCH_LIBRARY_IMPL(RELPOS_OPS, RELPOS_DEVICE, m) { m.impl("attention_bwd", TORCH_BOX(&attention_bwd)); }

}  // namespace
}  // namespace relpos
