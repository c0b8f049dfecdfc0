// attention_bwd.cu - the kernels of the attention's backward.
#include "attention.h"
#include "attention_bwd_keys.cuh"
#include "attention_bwd_queries.cuh"
#include "attention_bwd_window.cuh"

namespace relpos {

template <typename T>
void launch_attention_bwd_queries(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p) {
  dispatch_tiles<T>(plan, [&](auto d, auto blocks, auto one_line) {
    device.launch(attention_bwd_queries_kernel<T, d(), blocks(), one_line()>, dim3(static_cast<unsigned>(plan.grid)),
                  plan.threads, plan.shared_bytes, p);
  });
}

template <typename T>
void launch_attention_bwd_keys(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p) {
  dispatch_head_dim<T>(plan.head_dim, [&](auto d) {
    device.launch(attention_bwd_keys_kernel<T, d()>, dim3(static_cast<unsigned>(plan.grid)), plan.threads,
                  plan.shared_bytes, p);
  });
}

template <typename T>
void launch_attention_bwd_window(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p) {
  dispatch_head_dim<T>(plan.head_dim, [&](auto d) {
    if constexpr (sizeof(T) == 2 && d() <= kMostWindowD)
      device.launch(
          plan.whole_tables ? attention_bwd_window_kernel<T, d(), true> : attention_bwd_window_kernel<T, d(), false>,
          dim3(static_cast<unsigned>(plan.grid)), plan.threads, plan.shared_bytes, p);
  });
}

#define RELPOS_INSTANTIATE(T)                                                                                      \
  template void launch_attention_bwd_queries<T>(const Launcher&, const AttentionPlan&, const AttentionBwdParams&); \
  template void launch_attention_bwd_keys<T>(const Launcher&, const AttentionPlan&, const AttentionBwdParams&);    \
  template void launch_attention_bwd_window<T>(const Launcher&, const AttentionPlan&, const AttentionBwdParams&);
RELPOS_FOR_TYPES(RELPOS_INSTANTIATE)

}  // namespace relpos
