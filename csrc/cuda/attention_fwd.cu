// attention_fwd.cu - the forward of the attention on the GPU: check, fill params, plan, launch.
#include "attention_fwd.cuh"

#include <torch/csrc/stable/library.h>

#include "attention.h"

#ifndef RELPOS_OPS
#define RELPOS_OPS relpos_cuda
#define RELPOS_DEVICE CUDA
#endif

namespace relpos {
namespace {

void attention_fwd(Tensor out, std::optional<Tensor> lse, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& table, const Tensor& index, std::vector<int64_t> q_size, std::vector<int64_t> k_size,
                   int64_t prefix, double scale) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  if (lse) check_buffer("lse", *lse, q, ScalarType::Float, s.rows());
  AttentionFwdParams p;
  fill(p, s, q, k, v, table, index, scale);
  p.out = out_rows("out", out, q, s, s.M());
  p.lse = lse ? lse->mutable_data_ptr<float>() : nullptr;
  if (s.groups == 0) return;

  const OnDevice device(q);
  const AttentionPlan plan = plan_attention(AttentionKernel::kForward, s, bytes_of(q), device.arch(), scale);
  obey(p, plan);
  dispatch_attention(q.scalar_type(), plan.head_dim, [&](auto type, auto d) {
    using T = typename decltype(type)::type;
    dispatch_keys<T>(plan.keys, [&](auto blocks, auto one_line) {
      device.launch(attention_fwd_kernel<T, d(), blocks(), one_line()>, dim3(static_cast<unsigned>(plan.grid)),
                    plan.threads, plan.shared_bytes, p);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(RELPOS_OPS, RELPOS_DEVICE, m) { m.impl("attention_fwd", TORCH_BOX(&attention_fwd)); }

}  // namespace
}  // namespace relpos
