// logits.cu - the logits ops on the GPU: check, fill params, plan, launch.
#include "../boundary.h"
#include "../checks.h"
#include "../plan.h"
#include "dispatch.h"
#include "logits_bwd.cuh"
#include "logits_fwd.cuh"
#include "table_grad.h"

#ifndef RELPOS_OPS
#define RELPOS_OPS relpos_cuda
#define RELPOS_DEVICE CUDA
#endif

namespace relpos {
namespace {

void fill(LogitsParams& p, const Shape& s, const QueryStrides& strides, const Tensor& q, const Tensor& table,
          const Tensor& index, const LogitsPlan& plan) {
  RELPOS_CHECK(plan.refusal.empty(), plan.refusal);
  p.shape = s;
  p.q = {q.const_data_ptr(), strides.batch, strides.head, strides.row};
  p.whole_vectors_of_q = rows_are_aligned(p.q.data, strides, q.element_size());
  p.table = table.const_data_ptr();
  p.index = index.const_data_ptr<int32_t>();
  p.grid = QueryGrid(s);
  p.by_m = FastDiv(static_cast<int>(s.M()));
  p.by_heads = FastDiv(s.heads);
  p.block_rows = plan.block_rows;
  p.factor_ld = plan.factor_ld;
  p.q_ld = plan.q_ld;
  p.by_q_vectors = FastDiv(ceil_div(plan.q_ld * static_cast<int>(q.element_size()), 16));
}

// Where image rows of keys are whole vectors and a warp loads whole image rows at once.
template <typename S>
int line_lanes_log2(const LogitsParams& p) {
  constexpr int V = kVector<S>;
  const int keys_w = p.shape.axis[kW].keys;
  if (!p.whole_vectors || p.shape.prefix || keys_w % V || 32 * V % keys_w) return -1;
  int log2 = 0;
  while (V << log2 < keys_w) ++log2;
  return log2;
}

void logits_fwd(Tensor out, const std::optional<Tensor>& attn, const Tensor& q, const Tensor& table,
                const Tensor& index, std::vector<int64_t> q_size, std::vector<int64_t> k_size, int64_t prefix) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  const Tensor& logits = attn ? *attn : out;
  check_buffer("out", out, q, out.scalar_type(), s.rows() * s.N());
  check_buffer("attn", logits, q, out.scalar_type(), out.numel());
  check_table_alignment(table);
  if (s.rows() == 0) return;

  const OnDevice device(out);
  dispatch_dtypes(out.scalar_type(), q.scalar_type(), [&](auto logits_type, auto q_type) {
    using S = typename decltype(logits_type)::type;
    using T = typename decltype(q_type)::type;
    const LogitsPlan plan = plan_logits(Direction::kForward, s, sizeof(T), device.arch());
    LogitsFwdParams p;
    fill(p, s, strides, q, table, index, plan);
    p.logits = logits.const_data_ptr();
    p.out = out.mutable_data_ptr();
    const bool slabs = plan.block_rows * s.N() * static_cast<int64_t>(sizeof(S)) % 16 == 0;
    p.whole_vectors = slabs && is_aligned(p.logits, 16) && is_aligned(p.out, 16);
    p.line_lanes_log2 = line_lanes_log2<S>(p);
    p.in_two_lines = s.prefix == 0 && s.axis[kW].keys >= kVector<S>;
    p.by_n = FastDiv(static_cast<int>(s.N()));
    p.by_keys_w = FastDiv(s.axis[kW].keys);
    p.by_keys_h = FastDiv(s.axis[kH].keys);
    p.by_strips = FastDiv(ceil_div(plan.block_rows, plan.tensor_cores ? kStripMma : kStripSimt));
    if (p.line_lanes_log2 >= 0) p.by_runs = FastDiv(ceil_div(s.outer_keys() << p.line_lanes_log2, kRunVectors));
    auto kernel = logits_fwd_kernel<S, T, false>;
    if constexpr (sizeof(T) == 2)
      if (plan.tensor_cores) kernel = logits_fwd_kernel<S, T, true>;
    device.launch(kernel, dim3(static_cast<unsigned>(plan.grid)), kThreads, plan.shared_bytes, p);
  });
}

void logits_bwd(std::optional<Tensor> dq, std::optional<Tensor> dtable, const Tensor& grad, const Tensor& q,
                const Tensor& table, const Tensor& index, const std::optional<Tensor>& factors,
                const std::optional<Tensor>& partials, std::vector<int64_t> q_size, std::vector<int64_t> k_size,
                int64_t prefix) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  check_buffer("grad", grad, q, grad.scalar_type(), s.rows() * s.N());
  check_table_alignment(table);
  if (dq) check_buffer("dq", *dq, q, q.scalar_type(), q.numel());
  if (dtable) check_table_gradient(s, q, *dtable, factors, partials);
  const OnDevice device(grad);
  dispatch_dtypes(grad.scalar_type(), q.scalar_type(), [&](auto grad_type, auto q_type) {
    using S = typename decltype(grad_type)::type;
    using T = typename decltype(q_type)::type;
    if (s.rows() > 0) {
      const LogitsPlan plan = plan_logits(Direction::kBackward, s, sizeof(T), device.arch());
      LogitsBwdParams p;
      fill(p, s, strides, q, table, index, plan);
      p.grad = grad.const_data_ptr();
      p.dq = dq ? dq->mutable_data_ptr() : nullptr;
      p.dfactors = dtable ? factors->mutable_data_ptr<float>() : nullptr;
      p.whole_vectors = is_aligned(p.grad, 16);
      p.line_lanes_log2 = line_lanes_log2<S>(p);
      p.by_quads = FastDiv(ceil_div(s.D, 4));
      p.by_vectors = FastDiv(ceil_div(s.D, kVector<T>));
      auto kernel = logits_bwd_kernel<S, T, false>;
      if constexpr (sizeof(T) == 2)
        if (plan.tensor_cores) kernel = logits_bwd_kernel<S, T, true>;
      device.launch(kernel, dim3(static_cast<unsigned>(plan.grid)), kThreads, plan.shared_bytes, p);
    }
    if (dtable) launch_table_gradient(device, s, strides, q, index, *factors, *partials, *dtable);
  });
}

STABLE_TORCH_LIBRARY_IMPL(RELPOS_OPS, RELPOS_DEVICE, m) {
  m.impl("logits_fwd", boxed<&logits_fwd>);
  m.impl("logits_bwd", boxed<&logits_bwd>);
}

}  // namespace
}  // namespace relpos
