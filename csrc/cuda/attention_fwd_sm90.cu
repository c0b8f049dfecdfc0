// attention_fwd_sm90.cu - the kernels of the attention's forward for sm_90, and the tensor maps they read by.
#include "attention.h"
#include "attention_fwd_sm90.cuh"
#include "token_maps.h"

namespace relpos {
template <typename T>
void launch_attention_fwd_sm90(const Launcher& device, const AttentionPlan& plan, const AttentionFwdParams& p) {
  const AttentionFwdSm90Params all{p, map_of_keys(p, p.k), map_of_keys(p, p.v)};
  dispatch_tiles<T>(plan, [&](auto d, auto blocks, auto one_line) {
    device.launch(attention_fwd_sm90_kernel<T, d(), blocks(), one_line()>, dim3(static_cast<unsigned>(plan.grid)),
                  plan.threads, plan.shared_bytes, all);
  });
}

#define RELPOS_INSTANTIATE(T) \
  template void launch_attention_fwd_sm90<T>(const Launcher&, const AttentionPlan&, const AttentionFwdParams&);
RELPOS_FOR_TYPES(RELPOS_INSTANTIATE)

}  // namespace relpos
