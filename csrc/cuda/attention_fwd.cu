// attention_fwd.cu - the kernels of the attention's forward.
#include "attention.h"
#include "attention_fwd.cuh"
#include "attention_fwd_window.cuh"

namespace relpos {

template <typename T>
void launch_attention_fwd(const Launcher& device, const AttentionPlan& plan, const AttentionFwdParams& p) {
  dispatch_tiles<T>(plan, [&](auto d, auto blocks, auto one_line) {
    device.launch(attention_fwd_kernel<T, d(), blocks(), one_line()>, dim3(static_cast<unsigned>(plan.grid)),
                  plan.threads, plan.shared_bytes, p);
  });
}

template <typename T, int D, bool WHOLE>
constexpr auto fwd_window_kernel(bool short_lines) {
  return short_lines ? attention_fwd_window_kernel<T, D, 1, WHOLE> : attention_fwd_window_kernel<T, D, 2, WHOLE>;
}

template <typename T>
void launch_attention_fwd_window(const Launcher& device, const AttentionPlan& plan, const AttentionFwdParams& p) {
  dispatch_head_dim<T>(plan.head_dim, [&](auto d) {
    if constexpr (sizeof(T) == 2 && d() <= kMostFwdWindowD) {
      const bool short_lines = plan.keys.columns == 8;
      device.launch(plan.whole_tables ? fwd_window_kernel<T, d(), true>(short_lines)
                                      : fwd_window_kernel<T, d(), false>(short_lines),
                    dim3(static_cast<unsigned>(plan.grid)), plan.threads, plan.shared_bytes, p);
    }
  });
}

#define RELPOS_INSTANTIATE(T)                                                                              \
  template void launch_attention_fwd<T>(const Launcher&, const AttentionPlan&, const AttentionFwdParams&); \
  template void launch_attention_fwd_window<T>(const Launcher&, const AttentionPlan&, const AttentionFwdParams&);
RELPOS_FOR_TYPES(RELPOS_INSTANTIATE)

}  // namespace relpos
