// attention_bwd_sm90.cu - the kernels of the attention's backward for sm_90, and the tensor maps they read by.
#include "attention.h"
#include "attention_bwd_keys_sm90.cuh"
#include "attention_bwd_queries_sm90.cuh"
#include "token_maps.h"

namespace relpos {
namespace {

// What the first kernel leaves for the second: shared_attention.h.
TensorMap map_of_columns(const AttentionBwdParams& p) {
  const Shape& s = p.shape;
  const int64_t slots = KeySlots(s).line, row = slots * 2;
  return make_tensor_map(
      {p.columns, 2, 3, {slots, s.M(), s.groups}, {2, row, s.M() * row}, {kSm90Row, query_tile(2), 1}, Swizzle::k128});
}
TensorMap map_of_lines(const AttentionBwdParams& p, int lines) {  // so many in a box
  const Shape& s = p.shape;
  const int64_t all = KeySlots(s).lines(s) + statistics_of(2), row = padded_queries(s) * 4;
  return make_tensor_map({p.lines,
                          4,
                          3,
                          {padded_queries(s), all, s.groups},
                          {4, row, all * row},
                          {query_tile(2), lines, 1},
                          Swizzle::kNone});
}

}  // namespace

template <typename T>
void launch_attention_bwd_queries_sm90(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p) {
  const AttentionBwdQueriesSm90Params all{p, map_of_keys(p, p.k), map_of_keys(p, p.v)};
  dispatch_tiles<T>(plan, [&](auto d, auto blocks, auto one_line) {
    device.launch(attention_bwd_queries_sm90_kernel<T, d(), blocks(), one_line()>,
                  dim3(static_cast<unsigned>(plan.grid)), plan.threads, plan.shared_bytes, all);
  });
}

template <typename T>
void launch_attention_bwd_keys_sm90(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p) {
  const AttentionBwdKeysSm90Params all{p,
                                       map_of_queries(p, p.q),
                                       map_of_queries(p, p.grad),
                                       map_of_columns(p),
                                       map_of_lines(p, p.at_keys_sm90.line_count),
                                       map_of_lines(p, 1)};
  dispatch_head_dim<T>(plan.head_dim, [&](auto d) {
    device.launch(attention_bwd_keys_sm90_kernel<T, d()>, dim3(static_cast<unsigned>(plan.grid)), plan.threads,
                  plan.shared_bytes, all);
  });
}

#define RELPOS_INSTANTIATE(T)                                                               \
  template void launch_attention_bwd_queries_sm90<T>(const Launcher&, const AttentionPlan&, \
                                                     const AttentionBwdParams&);            \
  template void launch_attention_bwd_keys_sm90<T>(const Launcher&, const AttentionPlan&, const AttentionBwdParams&);
RELPOS_FOR_TYPES(RELPOS_INSTANTIATE)

}  // namespace relpos
