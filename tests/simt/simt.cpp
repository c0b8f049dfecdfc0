// simt.cpp - what simt.h declares: barriers, warp ops. machine.cpp has the threads.
//
// It throws simt::Error, with the kernel's source line and the thread, for
//   * a warp op whose mask lacks the caller, a shuffle from a lane that does not take part, mma or ldmatrix without all
//     32 lanes;
//   * an asynchronous copy nobody waited for.
//
// A thread that has exited counts as arrived, as on the hardware since sm_70.
#include <algorithm>
#include <cstring>
#include <map>

#include "machine.h"
#include "sm80.h"

namespace simt {
inline namespace machine {
namespace {

struct Group {  // the lanes of one mask
  unsigned mask;
  Gate gate{};
  unsigned present[2]{};
  Slot slots[2][warpSize]{};
};

struct Warp {
  unsigned live = 0;
  std::deque<Group> groups;
};

std::deque<Warp> warps;
Gate block_gate;
unsigned threads_left;

void open_if_complete(Group& group, const Warp& warp) {
  const unsigned present = group.present[group.gate.turn];
  if (group.gate.waiting.empty() || present != (group.mask & warp.live)) return;
  if (group.gate.op->whole_warp && present != ~0u)
    stop(text("%s: %s by lanes %08x; it needs the whole warp", where(group.gate.site).c_str(), group.gate.op->name,
              present));
  if (group.gate.op->combine) group.gate.op->combine(group.slots[group.gate.turn]);
  open(group.gate);
  group.present[group.gate.turn] = 0;
}

void open_block_gate_if_complete() {
  if (threads_left > 0 && block_gate.waiting.size() == threads_left) open(block_gate);
}

}  // namespace

Stats counts;

void begin_warps(unsigned threads) {
  threads_left = threads;
  block_gate = Gate{};
  warps.clear(), warps.resize((threads + warpSize - 1) / warpSize);
  for (unsigned t = 0; t < threads; ++t) warps[t / warpSize].live |= 1u << t % warpSize;
}

void leave_block(unsigned live) {
  check_thread_end();
  if (!self->copies.empty()) stop(text("thread %u exits before its asynchronous copies have arrived", self->index));
  threads_left = live;
  Warp& warp = warps[self->index / warpSize];
  warp.live &= ~(1u << self->index % warpSize);
  for (Group& group : warp.groups) open_if_complete(group, warp);
  open_block_gate_if_complete();
}

}  // namespace machine

const Stats& stats() { return counts; }
void reset_stats() { counts = {}; }

void block_barrier(const Site& site) {
  const Unobserved books;
  const int turn = block_gate.turn;
  join(block_gate, kSyncthreads, site);
  open_block_gate_if_complete();
  wait(block_gate, turn, kSyncthreads);
}

Gathered warp_op(const Op& op, unsigned mask, const void* mine, size_t bytes, const Site& site) {
  const Unobserved books;
  const unsigned lane = self->index % warpSize;
  if (!(mask >> lane & 1)) fail(site, "%s by lane %u, which mask %08x lacks", op.name, lane, mask);
  Warp& warp = warps[self->index / warpSize];
  const auto found =
      std::find_if(warp.groups.begin(), warp.groups.end(), [&](const Group& g) { return g.mask == mask; });
  Group& group = found != warp.groups.end() ? *found : warp.groups.emplace_back(Group{mask});
  const int turn = group.gate.turn;
  join(group.gate, op, site);
  if (bytes > 0) std::memcpy(group.slots[turn][lane].bytes, mine, bytes);
  group.present[turn] |= 1u << lane;
  open_if_complete(group, warp);
  wait(group.gate, turn, op);
  return {group.slots[turn], group.present[turn]};
}

}  // namespace simt

// For tests that load the emulated kernels as a library: a counter by name, and all of them back to zero.
extern "C" __attribute__((visibility("default"))) void simt_reset() { simt::reset_stats(); }
extern "C" __attribute__((visibility("default"))) long simt_count(const char* name) {
  using simt::Stats;
  static const std::map<std::string, long Stats::*> counters{{"mma", &Stats::mma},
                                                             {"ldmatrix", &Stats::ldmatrix},
                                                             {"bank_conflicts", &Stats::bank_conflicts},
                                                             {"shuffles", &Stats::shuffles},
                                                             {"votes", &Stats::votes},
                                                             {"warp_barriers", &Stats::warp_barriers},
                                                             {"block_barriers", &Stats::block_barriers},
                                                             {"cp_async", &Stats::cp_async},
                                                             {"stmatrix", &Stats::stmatrix},
                                                             {"named_barriers", &Stats::named_barriers},
                                                             {"tma", &Stats::tma},
                                                             {"wgmma", &Stats::wgmma}};
  const auto found = counters.find(name);
  return found == counters.end() ? -1 : simt::stats().*found->second;
}
