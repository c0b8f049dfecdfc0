// attention.h - the launches of the attention. Each takes a kernel for the plan's head dimension and tile of keys; the
// kernels of one dtype are a translation unit of their own, so that they compile side by side.
#pragma once
#include <type_traits>

#include "../params.h"
#include "runtime.h"

namespace relpos {

template <typename T>
void launch_attention_fwd(const Launcher& device, const AttentionPlan& plan, const AttentionFwdParams& p);
template <typename T>
void launch_attention_fwd_window(const Launcher& device, const AttentionPlan& plan, const AttentionFwdParams& p);
template <typename T>
void launch_attention_fwd_sm90(const Launcher& device, const AttentionPlan& plan, const AttentionFwdParams& p);
template <typename T>
void launch_attention_bwd_queries(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p);
template <typename T>
void launch_attention_bwd_queries_sm90(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p);
template <typename T>
void launch_attention_bwd_keys(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p);
template <typename T>
void launch_attention_bwd_keys_sm90(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p);
template <typename T>
void launch_attention_bwd_window(const Launcher& device, const AttentionPlan& plan, const AttentionBwdParams& p);

template <int V>
using Int = std::integral_constant<int, V>;

// f(Int<D>) for the head dimension of the kernel.
template <typename T, typename F>
void dispatch_head_dim(int head_dim, F&& f) {
  bool found = false;
  const auto if_it_is = [&](auto d) {
    if constexpr (kernel_head_dim(d(), sizeof(T)) == d()) {
      if (head_dim == d()) found = true, f(d);
    }
  };
  if_it_is(Int<64>{}), if_it_is(Int<80>{}), if_it_is(Int<96>{}), if_it_is(Int<112>{}), if_it_is(Int<128>{});
  RELPOS_CHECK(found, "no attention kernel for the head dimension ", head_dim);
}

// f(Int<blocks>, Int<one line per tile>) for the tiles of keys that `tile_keys` makes for this dtype.
template <typename T, int D, typename F>
void dispatch_keys(const KeyTiling& keys, F&& f) {
  if constexpr (sizeof(T) == 4) return f(Int<most_key_blocks(4, D)>{}, Int<false>{});
  if constexpr (sizeof(T) == 2) {
    if (!keys.one_line) return f(Int<kMaxKeyBlocks>{}, Int<false>{});
    if (keys.blocks == kMaxKeyBlocks) return f(Int<kMaxKeyBlocks>{}, Int<true>{});
    if constexpr (!kFewKernels) f(Int<6>{}, Int<true>{});
  }
}

// f(Int<D>, Int<blocks>, Int<one line per tile>) for the kernel of a plan.
template <typename T, typename F>
void dispatch_tiles(const AttentionPlan& plan, F&& f) {
  dispatch_head_dim<T>(plan.head_dim, [&](auto d) {
    dispatch_keys<T, d()>(plan.keys, [&](auto blocks, auto one_line) { f(d, blocks, one_line); });
  });
}

// The dtypes of a unit that holds kernels: one, RELPOS_TYPE, or all.
#if defined(RELPOS_TYPE)
#define RELPOS_FOR_TYPES(INSTANTIATE) INSTANTIATE(RELPOS_TYPE)
#else
#define RELPOS_FOR_TYPES(INSTANTIATE) INSTANTIATE(__half) INSTANTIATE(__nv_bfloat16) INSTANTIATE(float)
#endif

}  // namespace relpos
