#include "plan_attention.h"

#include <algorithm>

#include "plan.h"
#include "shared_attention.h"

namespace relpos {
namespace {

constexpr int kMostColumnsOfManyLines = 32;  // longer lines have a tile of their own
constexpr int kMostWarps = 8;                // of an SM: each takes nearly all registers that a thread may have
constexpr int kPastEverySpan = 1 << 20;

int blocks_of(int columns) { return columns <= 48 && !kFewKernels ? 6 : kMaxKeyBlocks; }

std::string with(const char* what, int64_t value) { return what + std::to_string(value); }

std::string refusal_of(const Shape& s, double scale) {
  if (kernel_head_dim(s.D, 2) == 0) return with("attention kernels take multiples of 8 up to 128 as D, not ", s.D);
  if (!(scale >= kLeastScale && scale <= kMostScale))
    return "scale = " + std::to_string(scale) + " is not between 1/512 and 512";
  constexpr int64_t kMost = (int64_t{1} << 31) - 4096;
  if (s.M() > kMost || s.N() > kMost || s.groups * ceil_div<int64_t>(s.M(), 16) > kMost)
    return "there are more than 2^31 tokens or blocks";
  return "";
}

std::string window_refusal(const Shape& s, int bytes) {
  const int keys_w = s.axis[kW].keys, lines = s.outer_keys();
  if (bytes != 2) return "windows are of half precision";
  if (kernel_head_dim(s.D, bytes) > kMostWindowD) return with("windows have a D up to 80, not ", s.D);
  if (s.prefix) return "windows have no class tokens";
  if (keys_w <= kWindowLine / 2 || keys_w > kWindowLine)
    return with("windows have 9 to 16 keys in a line, not ", keys_w);
  if (lines > kMostWindowLines) return with("windows have up to 16 lines of keys, not ", lines);
  if (s.M() > kWindowPasses * 16 * ceil_div(lines, kWindowWarpLines))
    return with("a window with so few keys has too many queries: ", s.M());
  return "";
}

std::string fwd_window_refusal(const Shape& s, int bytes) {
  const int keys_w = s.axis[kW].keys;
  if (bytes != 2) return "windows are of half precision";
  if (kernel_head_dim(s.D, bytes) > kMostFwdWindowD) return with("windows have a D up to 96, not ", s.D);
  if (keys_w > kWindowLine) return with("windows have up to 16 keys in a line, not ", keys_w);
  if (s.N() > kMostWindowKeys) return with("windows have up to 320 keys, not ", s.N());
  return "";
}

AttentionPlan plan_window(const Shape& s, int bytes, int arch, double scale) {
  AttentionPlan plan;
  plan.refusal = refusal_of(s, scale);
  if (plan.refusal.empty()) plan.refusal = window_refusal(s, bytes);
  if (!plan.refusal.empty()) return plan;
  const int warps = ceil_div(s.outer_keys(), kWindowWarpLines);
  plan.head_dim = kernel_head_dim(s.D, bytes);
  plan.threads = warps * 32;
  plan.block_rows = warps * 16;
  plan.grid = s.groups;
  const int64_t most = shared_limits(arch).per_block;
  const auto bytes_with = [&](bool whole_tables) {
    return attention_bwd_window_shared(s, plan.block_rows, plan.head_dim, whole_tables).total;
  };
  plan.whole_tables = has_whole_tables(s) && bytes_with(true) <= most;
  plan.shared_bytes = bytes_with(plan.whole_tables);
  if (plan.shared_bytes > most)
    plan.refusal = "a window of " + std::to_string(plan.shared_bytes) + " bytes exceeds shared memory";
  return plan;
}

AttentionPlan plan_fwd_window(const Shape& s, int bytes, int arch, double scale) {
  AttentionPlan plan;
  plan.refusal = refusal_of(s, scale);
  if (plan.refusal.empty()) plan.refusal = fwd_window_refusal(s, bytes);
  if (!plan.refusal.empty()) return plan;
  plan.keys = tile_keys(s, bytes, kWindowBlocks);
  const int outer = s.axis[kH].factors() + (s.axis[kT].rows ? s.axis[kT].keys + s.outer_keys() : 0);
  plan.keys.staged = std::max(plan.keys.columns + kInnerPad, outer);
  const int D = plan.head_dim = kernel_head_dim(s.D, bytes);
  const SharedLimits limits = shared_limits(arch);
  const int64_t strips = ceil_div<int64_t>(s.M(), 16);
  int most_resident = 0;
  const auto try_blocks_of = [&](int threads, bool whole_tables) {
    const int64_t most_warps = threads / 32;
    const int64_t passes = std::min<int64_t>(kFwdWindowPasses, ceil_div(strips, most_warps));
    const int64_t blocks = ceil_div(strips, most_warps * passes);
    const int warps = static_cast<int>(ceil_div(ceil_div(strips, blocks), passes));
    const int64_t shared = attention_fwd_window_shared(s, plan.keys, warps * 16, D, whole_tables).total;
    const int64_t fit =
        std::min<int64_t>(kMostFwdWindowThreads / 32 / warps, limits.per_sm / (shared + kReservedPerBlock));
    const int resident = warps * static_cast<int>(fit);
    if (shared > limits.per_block || resident <= most_resident) return;
    most_resident = resident;
    plan.threads = warps * 32;
    plan.block_rows = warps * 16 * static_cast<int>(passes);
    plan.shared_bytes = shared;
    plan.grid = s.groups * ceil_div<int64_t>(s.M(), plan.block_rows);
    plan.whole_tables = whole_tables;
  };
  for (const bool whole_tables : {true, false})
    for (const int threads : {kFwdWindowThreads, kMostFwdWindowThreads})
      if (!whole_tables || has_whole_tables(s)) try_blocks_of(threads, whole_tables);
  if (most_resident == 0) plan.refusal = "all keys of a window, and their values, exceed shared memory";
  return plan;
}

std::string sm90_refusal(bool keys_stay, const Shape& s, int bytes, int arch) {
  if (bytes != 2 || arch != 90) return "kernels for sm_90 are of half precision";
  if (!keys_stay && s.prefix) return "no class tokens pass in kernels for sm_90";
  if (keys_stay && KeySlots(s).line > kMostSlotsOfLine)
    return with("lines of keys have up to 128, not ", s.axis[kW].keys);
  return "";
}

AttentionPlan plan_sm90(AttentionKernel kernel, const Shape& s, int bytes, int arch, double scale) {
  const bool keys_stay = kernel == AttentionKernel::kBackwardKeysSm90;
  AttentionPlan plan;
  plan.refusal = refusal_of(s, scale);
  if (plan.refusal.empty()) plan.refusal = sm90_refusal(keys_stay, s, bytes, arch);
  if (!plan.refusal.empty()) return plan;
  plan.keys = tile_keys(s, bytes);
  const int D = plan.head_dim = kernel_head_dim(s.D, bytes);
  plan.threads = kSm90Threads;
  plan.block_rows = kSm90Rows;
  plan.grid = s.groups * ceil_div<int64_t>(keys_stay ? KeySlots(s).count(s) : s.M(), kSm90Rows);
  for (int& n = plan.stages = kMostStages; n >= kKeyStages; --n) {
    plan.shared_bytes = keys_stay ? attention_bwd_keys_sm90_shared(s, D, n).total
                        : kernel == AttentionKernel::kForwardSm90
                            ? attention_fwd_sm90_shared(plan.keys, D, n).total
                            : attention_bwd_queries_sm90_shared(plan.keys, D, n).total;
    if (plan.shared_bytes <= shared_limits(arch).per_block) return plan;
  }
  plan.refusal = "the factors of 128 queries, " + std::to_string(plan.shared_bytes) + " bytes, exceed shared memory";
  return plan;
}

}  // namespace

KeyTiling tile_keys(const Shape& s, int bytes, int most_blocks) {
  const int keys_w = s.axis[kW].keys;
  KeyTiling t;
  t.one_line = bytes == 2 && keys_w > kMostColumnsOfManyLines;
  t.spans = ceil_div(keys_w, most_blocks * 8);
  t.columns = round_up(ceil_div(keys_w, t.spans), 8);
  t.blocks = t.one_line ? blocks_of(t.columns) : most_blocks;
  const int line_blocks = t.columns / 8;
  t.lines = t.one_line ? 1 : t.blocks / line_blocks;
  t.padded_lines = round_up(s.outer_keys(), t.lines);
  t.tiles = t.padded_lines / t.lines;
  t.class_tiles = ceil_div(s.prefix, t.keys());
  t.staged = std::max(t.keys() + kInnerPad, s.axis[kT].factors() + s.axis[kH].factors());
  for (int j = 0; j < kMaxKeyBlocks; ++j) {
    const bool used = j < t.lines * line_blocks;
    t.line_of[j] = used ? j / line_blocks : 0;
    t.column_of[j] = used ? j % line_blocks * 8 : kPastEverySpan;
  }
  return t;
}

KeyTiling tile_keys(const Shape& s, int bytes) {
  return tile_keys(s, bytes, most_key_blocks(bytes, kernel_head_dim(s.D, bytes)));
}

std::string AttentionPlan::kernel(AttentionKernel which) const {
  if (!refusal.empty()) return "none";
  const auto with_tile = [&](const char* name) {
    return with(name, head_dim) + (keys.one_line ? "_line_" : "_lines_") + std::to_string(keys.keys());
  };
  switch (which) {
    case AttentionKernel::kForward:
      return with_tile("attention_fwd_d");
    case AttentionKernel::kForwardWindow:
      return with("attention_fwd_window_d", head_dim) + with("_line_", keys.columns);
    case AttentionKernel::kForwardSm90:
      return with_tile("attention_fwd_sm90_d");
    case AttentionKernel::kBackwardQueries:
      return with_tile("attention_bwd_queries_d");
    case AttentionKernel::kBackwardQueriesSm90:
      return with_tile("attention_bwd_queries_sm90_d");
    case AttentionKernel::kBackwardKeys:
      return with("attention_bwd_keys_d", head_dim);
    case AttentionKernel::kBackwardKeysSm90:
      return with("attention_bwd_keys_sm90_d", head_dim);
    case AttentionKernel::kBackwardWindow:
      break;
  }
  return with("attention_bwd_window_d", head_dim);
}

AttentionPlan plan_attention(AttentionKernel kernel, const Shape& s, int bytes, int arch, double scale) {
  if (kernel == AttentionKernel::kForwardWindow) return plan_fwd_window(s, bytes, arch, scale);
  if (kernel == AttentionKernel::kBackwardWindow) return plan_window(s, bytes, arch, scale);
  if (kernel == AttentionKernel::kForwardSm90 || kernel == AttentionKernel::kBackwardQueriesSm90 ||
      kernel == AttentionKernel::kBackwardKeysSm90)
    return plan_sm90(kernel, s, bytes, arch, scale);
  AttentionPlan plan;
  plan.refusal = refusal_of(s, scale);
  if (!plan.refusal.empty()) return plan;
  plan.keys = tile_keys(s, bytes);
  const int D = plan.head_dim = kernel_head_dim(s.D, bytes);
  const bool forward = kernel == AttentionKernel::kForward, of_keys = kernel == AttentionKernel::kBackwardKeys;
  const int64_t rows = of_keys ? KeySlots(s).count(s) : s.M();
  const SharedLimits limits = shared_limits(arch);
  // Where an SM holds as many warps either way: two small blocks, for one works while the other waits; but one large
  // block of the queries of the backward, whose warps are to share what passes.
  int most_resident = 0;
  int64_t least_shared = 0;
  const bool small = forward || of_keys;
  for (const int warps : {small ? 4 : 8, small ? 8 : 4, 2, 1}) {
    const int block_rows = warps * 16 * (small ? strips_of(bytes, D) : 1);
    const int64_t shared = forward   ? attention_fwd_shared(s, plan.keys, block_rows, D, bytes).total
                           : of_keys ? attention_bwd_keys_shared(s, block_rows, D, bytes).total
                                     : attention_bwd_queries_shared(s, plan.keys, block_rows, D, bytes).total;
    least_shared = least_shared ? std::min(least_shared, shared) : shared;
    const bool half_idle = warps > 1 && block_rows / 2 >= rows;
    if (shared > limits.per_block || half_idle) continue;
    const int64_t blocks = std::min<int64_t>(kMostWarps / warps, limits.per_sm / (shared + kReservedPerBlock));
    const int resident = warps * static_cast<int>(blocks);
    if (resident <= most_resident) continue;
    most_resident = resident;
    plan.threads = warps * 32;
    plan.block_rows = block_rows;
    plan.shared_bytes = shared;
  }
  if (most_resident == 0) {
    plan.refusal = "the factors of a few queries and a tile of keys, " + std::to_string(least_shared) +
                   " bytes, exceed shared memory";
    return plan;
  }
  plan.grid = s.groups * ceil_div<int64_t>(rows, plan.block_rows);
  return plan;
}

}  // namespace relpos
