// attention.cu - the attention ops on the GPU: check, fill params, plan, launch one kernel after another.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>

#include "../boundary.h"
#include "attention.h"
#include "dispatch.h"
#include "table_grad.h"
#include "token_maps.h"

#ifndef RELPOS_OPS
#define RELPOS_OPS relpos_cuda
#define RELPOS_DEVICE CUDA
#endif

namespace relpos {
namespace {

#if defined(RELPOS_SM90A) || defined(RELPOS_EMULATE)
constexpr bool kWithSm90 = true;  // that attention_fwd_sm90.cu and attention_bwd_sm90.cu are compiled, too
#else
constexpr bool kWithSm90 = false;
#endif

// Kernels read and write rows by vectors of 16 bytes. A view that starts or steps at odd places is copied: here, since
// what is traced ahead of the call does not know where its tensors will start.
Tensor in_vectors(const Tensor& t) {
  bool fits = is_aligned(t.const_data_ptr(), 16);
  for (int64_t i = 0; i + 1 < t.dim(); ++i) fits = fits && t.stride(i) * t.element_size() % 16 == 0;
  if (fits) return t;
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  return torch::stable::copy_(copy, t);
}

template <typename Data>
TokenRows<Data> aligned_rows(const char* name, Data data, const QueryStrides& strides, int64_t bytes) {
  RELPOS_CHECK(rows_are_aligned(data, strides, bytes), "every row of ", name, " must start at a multiple of 16 bytes");
  return {data, strides.batch, strides.head, strides.row};
}
InRows in_rows(const char* name, const Tensor& t, const Tensor& q, const Shape& s, int64_t tokens) {
  return aligned_rows(name, t.const_data_ptr(), check_tokens(name, t, q, s, tokens), t.element_size());
}
OutRows out_rows(const char* name, const Tensor& t, const Tensor& q, const Shape& s, int64_t tokens) {
  return aligned_rows(name, t.mutable_data_ptr(), check_tokens(name, t, q, s, tokens), t.element_size());
}

int bytes_of(const Tensor& t) { return static_cast<int>(t.element_size()); }

void fill(AttentionParams& p, const Shape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table,
          const Tensor& index, double scale) {
  p.shape = s;
  p.q = in_rows("q", q, q, s, s.M());
  p.k = in_rows("k", k, q, s, s.N());
  p.v = in_rows("v", v, q, s, s.N());
  check_table_alignment(table);
  p.table = table.const_data_ptr();
  p.index = index.const_data_ptr<int32_t>();
  p.grid = QueryGrid(s);
  constexpr double kLog2e = 1.4426950408889634;
  p.scale = static_cast<float>(scale);
  p.inverse_scale = static_cast<float>(1 / scale);
  p.to_powers = static_cast<float>(scale * kLog2e);
  p.from_powers = static_cast<float>(1 / (scale * kLog2e));
  p.by_heads = FastDiv(s.heads);
}

// These params obey a plan from then on. Where things lie in shared memory is a matter of the plan, too: computed by
// the kernel, it would cost registers.
AttentionPlan obeyed(AttentionPlan plan, AttentionParams& p) {
  p.keys = plan.keys;
  p.block_rows = plan.block_rows;
  p.by_tiles = FastDiv(static_cast<int>(plan.grid / p.shape.groups));
  return plan;
}
AttentionPlan plan_for(AttentionKernel kernel, AttentionParams& p, const OnDevice& device, const Tensor& q) {
  AttentionPlan plan = plan_attention(kernel, p.shape, bytes_of(q), device.arch(), p.scale);
  RELPOS_CHECK(plan.refusal.empty(), plan.refusal);
  return obeyed(std::move(plan), p);
}

// The same of a kernel that takes some problems only, if it takes this one.
std::optional<AttentionPlan> plan_if_taken(AttentionKernel kernel, AttentionParams& p, const OnDevice& device,
                                           const Tensor& q) {
  AttentionPlan plan = plan_attention(kernel, p.shape, bytes_of(q), device.arch(), p.scale);
  if (!plan.refusal.empty()) return {};
  return obeyed(std::move(plan), p);
}

// Which kernels sm_90 gets: "0", those of every architecture; "1", its own wherever they can; else, where they are
// faster.
bool wgmma_is(const char* value) {
  const char* wanted = std::getenv("RELPOS_CUDA_WGMMA");
  return wanted && std::strcmp(wanted, value) == 0;
}

// The same of a kernel for sm_90; `passing` is what TMA is to read.
std::optional<AttentionPlan> plan_sm90(AttentionKernel kernel, AttentionParams& p, const OnDevice& device,
                                       const Tensor& q, int64_t tokens, std::initializer_list<InRows> passing) {
  if (wgmma_is("0")) return {};
  for (const InRows& rows : passing)
    if (!has_strides(rows, p.shape, tokens)) return {};
  return plan_if_taken(kernel, p, device, q);
}

// What the first kernel of the backward leaves for the second: csrc/shared_attention.h.
void use_cache(AttentionBwdParams& p, const Tensor& q, const std::optional<Tensor>& columns,
               const std::optional<Tensor>& lines) {
  RELPOS_CHECK(columns && lines, "dk and dv need the work spaces columns and lines");
  const Shape& s = p.shape;
  const KeySlots slots(s);
  const ScalarType type = bytes_of(q) == 2 ? ScalarType::Half : ScalarType::Float;
  check_buffer("columns", *columns, q, type, s.rows() * slots.line);
  check_buffer("lines", *lines, q, ScalarType::Float,
               s.groups * (slots.lines(s) + statistics_of(bytes_of(q))) * padded_queries(s));
  p.columns = columns->mutable_data_ptr();
  p.lines = lines->mutable_data_ptr<float>();
}

// Whether one of these took the problem.
template <typename T>
bool launch_fwd_sm90(const OnDevice& device, AttentionFwdParams& p, const Tensor& q) {
  if constexpr (kWithSm90 && sizeof(T) == 2)
    if (const auto plan = plan_sm90(AttentionKernel::kForwardSm90, p, device, q, p.shape.N(), {p.k, p.v})) {
      p.at_sm90 = attention_fwd_sm90_shared(p.keys, plan->head_dim, plan->stages);
      launch_attention_fwd_sm90<T>(device, *plan, p);
      return true;
    }
  return false;
}
template <typename T>
bool launch_fwd_window(const OnDevice& device, AttentionFwdParams& p, const Tensor& q) {
  if constexpr (sizeof(T) == 2)
    if (const auto plan = plan_if_taken(AttentionKernel::kForwardWindow, p, device, q)) {
      p.at_window = attention_fwd_window_shared(p.shape, p.keys, plan->threads / 2, plan->head_dim, plan->whole_tables);
      launch_attention_fwd_window<T>(device, *plan, p);
      return true;
    }
  return false;
}

template <typename T>
void launch_fwd(const OnDevice& device, AttentionFwdParams& p, const Tensor& q) {
  if (wgmma_is("1") && launch_fwd_sm90<T>(device, p, q)) return;
  if (launch_fwd_window<T>(device, p, q) || launch_fwd_sm90<T>(device, p, q)) return;
  const AttentionPlan plan = plan_for(AttentionKernel::kForward, p, device, q);
  p.at = attention_fwd_shared(p.shape, p.keys, p.block_rows, plan.head_dim, sizeof(T));
  launch_attention_fwd<T>(device, plan, p);
}

void attention_fwd(Tensor out, std::optional<Tensor> lse, Tensor q, Tensor k, Tensor v, const Tensor& table,
                   const Tensor& index, std::vector<int64_t> q_size, std::vector<int64_t> k_size, int64_t prefix,
                   double scale) {
  for (Tensor* t : {&q, &k, &v}) *t = in_vectors(*t);
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  if (lse) check_buffer("lse", *lse, q, ScalarType::Float, s.rows());
  AttentionFwdParams p;
  fill(p, s, q, k, v, table, index, scale);
  p.out = out_rows("out", out, q, s, s.M());
  p.lse = lse ? lse->mutable_data_ptr<float>() : nullptr;
  if (s.groups == 0) return;

  const OnDevice device(q);
  dispatch_dtype(q.scalar_type(), [&](auto type) { launch_fwd<typename decltype(type)::type>(device, p, q); });
}

template <typename T>
void launch_bwd_window(const OnDevice& device, AttentionBwdParams& p, const Tensor& q) {
  const AttentionPlan plan = plan_for(AttentionKernel::kBackwardWindow, p, device, q);
  p.at_window = attention_bwd_window_shared(p.shape, plan.block_rows, plan.head_dim, plan.whole_tables);
  launch_attention_bwd_window<T>(device, plan, p);
}

template <typename T>
void launch_bwd_queries(const OnDevice& device, AttentionBwdParams& p, const Tensor& q) {
  if constexpr (kWithSm90 && sizeof(T) == 2)
    if (const auto plan = plan_sm90(AttentionKernel::kBackwardQueriesSm90, p, device, q, p.shape.N(), {p.k, p.v})) {
      p.at_queries_sm90 = attention_bwd_queries_sm90_shared(p.keys, plan->head_dim, plan->stages);
      return launch_attention_bwd_queries_sm90<T>(device, *plan, p);
    }
  const AttentionPlan plan = plan_for(AttentionKernel::kBackwardQueries, p, device, q);
  p.at_queries = attention_bwd_queries_shared(p.shape, p.keys, p.block_rows, plan.head_dim, sizeof(T));
  launch_attention_bwd_queries<T>(device, plan, p);
}

template <typename T>
void launch_bwd_keys(const OnDevice& device, AttentionBwdParams& p, const Tensor& q) {
  if constexpr (kWithSm90 && sizeof(T) == 2)
    if (const auto plan = plan_sm90(AttentionKernel::kBackwardKeysSm90, p, device, q, p.shape.M(), {p.q, p.grad})) {
      p.at_keys_sm90 = attention_bwd_keys_sm90_shared(p.shape, plan->head_dim, plan->stages);
      return launch_attention_bwd_keys_sm90<T>(device, *plan, p);
    }
  const AttentionPlan plan = plan_for(AttentionKernel::kBackwardKeys, p, device, q);
  p.at_keys = attention_bwd_keys_shared(p.shape, p.block_rows, plan.head_dim, sizeof(T));
  launch_attention_bwd_keys<T>(device, plan, p);
}

void attention_bwd(std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv,
                   std::optional<Tensor> dtable, Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out,
                   const Tensor& lse, const Tensor& table, const Tensor& index, const std::optional<Tensor>& factors,
                   const std::optional<Tensor>& partials, const std::optional<Tensor>& columns,
                   const std::optional<Tensor>& lines, std::vector<int64_t> q_size, std::vector<int64_t> k_size,
                   int64_t prefix, double scale) {
  for (Tensor* t : {&grad, &q, &k, &v, &out}) *t = in_vectors(*t);
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  check_buffer("lse", lse, q, ScalarType::Float, s.rows());
  if (dtable) check_table_gradient(s, q, *dtable, factors, partials);
  AttentionBwdParams p;
  fill(p, s, q, k, v, table, index, scale);
  p.grad = in_rows("grad", grad, q, s, s.M());
  p.out = in_rows("out", out, q, s, s.M());
  p.lse = lse.const_data_ptr<float>();
  if (dq) p.dq = out_rows("dq", *dq, q, s, s.M());
  if (dk) p.dk = out_rows("dk", *dk, q, s, s.N());
  if (dv) p.dv = out_rows("dv", *dv, q, s, s.N());
  const bool in_one_pass = (dk || dv) && !columns && !lines;
  if ((dk || dv) && !in_one_pass) use_cache(p, q, columns, lines);
  p.dfactors = dtable ? factors->mutable_data_ptr<float>() : nullptr;

  const OnDevice device(q);
  if (s.groups > 0)
    dispatch_dtype(q.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      if (in_one_pass) return launch_bwd_window<T>(device, p, q);
      launch_bwd_queries<T>(device, p, q);
      if (dk || dv) launch_bwd_keys<T>(device, p, q);
    });
  if (dtable) launch_table_gradient(device, s, strides, q, index, *factors, *partials, *dtable);
}

STABLE_TORCH_LIBRARY_IMPL(RELPOS_OPS, RELPOS_DEVICE, m) {
  m.impl("attention_fwd", boxed<&attention_fwd>);
  m.impl("attention_bwd", boxed<&attention_bwd>);
}

}  // namespace
}  // namespace relpos
