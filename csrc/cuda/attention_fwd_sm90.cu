// attention_fwd_sm90.cu - the kernels of the attention's forward for sm_90, and the tensor maps they read by.
#include "attention.h"
#include "attention_fwd_sm90.cuh"

namespace relpos {
namespace {

// Keys or values of all groups, without class tokens: a box is some columns of some lines of one group.
template <typename T>
TensorMap map_of(const AttentionFwdParams& p, const InRows& rows) {
  constexpr int64_t kBytes = sizeof(T);
  const Shape& s = p.shape;
  const int64_t columns = s.axis[kW].keys, batch = s.groups / s.heads;
  const auto step = [](int64_t size, int64_t stride) { return size == 1 ? 16 : stride * kBytes; };  // 16: not used
  return make_tensor_map({rows.data,
                          int{kBytes},
                          5,
                          {s.D, columns, s.outer_keys(), s.heads, batch},
                          {kBytes, step(columns, rows.row), step(s.outer_keys(), rows.row * columns),
                           step(s.heads, rows.head), step(batch, rows.batch)},
                          {kSm90Row, p.keys.columns, p.keys.lines, 1, 1},
                          Swizzle::k128});
}

}  // namespace

template <typename T>
void launch_attention_fwd_sm90(const OnDevice& device, const AttentionPlan& plan, const AttentionFwdParams& p) {
  const AttentionFwdSm90Params all{p, map_of<T>(p, p.k), map_of<T>(p, p.v)};
  dispatch_head_dim<T>(plan.head_dim, [&](auto d) {
    dispatch_keys<T, d()>(plan.keys, [&](auto blocks, auto one_line) {
      device.launch(attention_fwd_sm90_kernel<T, d(), blocks(), one_line()>, dim3(static_cast<unsigned>(plan.grid)),
                    plan.threads, plan.shared_bytes, all);
    });
  });
}

#define RELPOS_INSTANTIATE(T) \
  template void launch_attention_fwd_sm90<T>(const OnDevice&, const AttentionPlan&, const AttentionFwdParams&);
RELPOS_FOR_TYPES(RELPOS_INSTANTIATE)

}  // namespace relpos
