// simt.cpp - what simt.h declares: whose turn it is, barriers, warp ops. machine.cpp has the threads.
//
// It throws simt::Error, with the kernel's source line and the thread, for
//   * a warp op whose mask lacks the caller, a shuffle from a lane that does not take part, mma or ldmatrix without all
//     32 lanes;
//   * one barrier or warp op met at two different source lines;
//   * an asynchronous copy nobody waited for.
//
// A thread that has exited counts as arrived, as on the hardware since sm_70.
#include "simt.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <map>
#include <utility>

#include "machine.h"

uint3 threadIdx;

namespace simt {

int running_thread;

inline namespace machine {

Schedule schedule;
Thread* self = &host;
unsigned live;
Stats counts;

namespace {

class Queue {  // of all threads that can run
 public:
  bool empty() const { return size_ == 0; }
  unsigned size() const { return size_; }
  Thread*& operator[](unsigned i) { return at_[(first_ + i) % kMost]; }
  void push_back(Thread* t) { (*this)[size_++] = t; }
  Thread* pop_back() { return (*this)[--size_]; }
  Thread* pop_front() {
    Thread* const t = (*this)[0];
    ++first_, --size_;
    return t;
  }
  void clear() { size_ = 0; }

 private:
  static constexpr unsigned kMost = 1024;
  std::array<Thread*, kMost> at_;
  unsigned first_ = 0, size_ = 0;
};

struct Group {  // the lanes of one mask
  unsigned mask = ~0u;
  unsigned present[2]{};
  unsigned words = 0;  // of each lane
  Gate gate{};
  Slots brought[2]{};
};

struct Warp {
  unsigned live = 0;
  Group whole{};
  std::list<Group> parts{};
};

Queue ready;
std::vector<Warp> warps;
Gate block_gate;

}  // namespace

// ---- whose turn it is

size_t choose(size_t waiting) { return schedule == kFifo ? 0 : schedule == kLifo ? waiting - 1 : rng() % waiting; }

Thread& next_thread() {
  while (ready.empty() && live > 0)
    if (!deliver_copy()) report_deadlock();
  if (ready.empty()) return host;
  if (schedule == kFifo) {
    if (ready.size() > 2) ready[1]->prefetch_stack(), ready[2]->prefetch();
    return *ready.pop_front();
  }
  if (schedule == kRandom) std::swap(ready[ready.size() - 1], ready[static_cast<unsigned>(rng() % ready.size())]);
  return *ready.pop_back();
}

void switch_to(Thread& to) {
  threadIdx = {to.x, to.y, to.z}, running_thread = to.index;
  std::exchange(self, &to)->switch_to(to);
}

void park(std::vector<Thread*>& among, const Op& op, const Site& site) {
  among.push_back(self);
  self->waits_in = &op, self->waits_at = site;
  switch_to(next_thread());
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* t : waiting) ready.push_back(t);
  waiting.clear();
}

// ---- rendezvous: join, open the gate if complete, wait

namespace {

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

[[noreturn]] __attribute__((noinline)) void report_divergence(const Gate& gate, const Op& op, const Site& site) {
  stop(text("divergence: thread %u is in %s at %s, thread %u waits in %s at %s", self->index, op.name,
            where(site).c_str(), gate.waiting[0]->index, gate.op->name, where(gate.site).c_str()));
}

}  // namespace

void join(Gate& gate, const Op& op, const Site& site) {
  if (gate.waiting.empty())
    gate.op = &op, gate.site = site;
  else if (gate.op != &op || !same(gate.site, site))
    report_divergence(gate, op, site);
  gate.waiting.push_back(self);
  self->waits_in = &op, self->waits_at = site;
  if (op.orders_memory) gate.order[gate.turn].release(self->identity);
}

// The caller has joined; `turn` is the gate's when it did.
void wait(Gate& gate, int turn, const Op& op) {
  switch_to(next_thread());
  if (op.orders_memory) gate.order[turn].acquire(self->identity);
}

void open(Gate& gate) {
  ++(counts.*gate.op->counter);
  wake(gate.waiting);
  gate.turn ^= 1;
}

namespace {

void open_if_complete(Group& group, const Warp& warp) {
  Gate& gate = group.gate;
  const int turn = gate.turn;
  const unsigned present = group.present[turn];
  if (gate.waiting.empty() || present != (group.mask & warp.live)) return;
  if (gate.op->whole_warp && present != ~0u)
    stop(text("%s: %s by lanes %08x; it needs the whole warp", where(gate.site).c_str(), gate.op->name, present));
  if (gate.op->combine) gate.op->combine(group.brought[turn]);
  group.present[turn ^ 1] = 0;
  open(gate);
}

void open_block_gate_if_complete() {
  if (live > 0 && block_gate.waiting.size() == live) open(block_gate);
}

__attribute__((noinline)) Group& part_of(Warp& warp, unsigned mask) {
  const auto has_it = [&](const Group& g) { return g.mask == mask; };
  const auto found = std::find_if(warp.parts.begin(), warp.parts.end(), has_it);
  return found != warp.parts.end() ? *found : warp.parts.emplace_back(Group{mask});
}

[[noreturn]] __attribute__((noinline)) void report_absence(const Op& op, unsigned mask, const Site& site) {
  fail(site, "%s by lane %u, which mask %08x lacks", op.name, self->index % warpSize, mask);
}

}  // namespace

void begin_warps(const std::vector<Thread*>& threads) {
  live = static_cast<unsigned>(threads.size());
  block_gate = Gate{};
  warps.clear(), warps.resize((live + warpSize - 1) / warpSize);
  for (Thread* t : threads) warps[t->index / warpSize].live |= 1u << t->index % warpSize, ready.push_back(t);
}

void abandon_block() { ready.clear(); }

void leave_block() {
  check_thread_end();
  if (!self->copies.empty()) stop(text("thread %u exits before its asynchronous copies have arrived", self->index));
  --live;
  Warp& warp = warps[self->index / warpSize];
  warp.live &= ~(1u << self->index % warpSize);
  open_if_complete(warp.whole, warp);
  for (Group& group : warp.parts) open_if_complete(group, warp);
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

Gathered warp_op(const Op& op, unsigned mask, const uint32_t* mine, unsigned words, const Site& site) {
  const Unobserved books;
  const unsigned lane = self->index % warpSize;
  if (!(mask >> lane & 1)) report_absence(op, mask, site);
  Warp& warp = warps[self->index / warpSize];
  Group& group = mask == ~0u ? warp.whole : part_of(warp, mask);
  const int turn = group.gate.turn;
  if (std::exchange(group.words, words) != words && group.present[turn] != 0) report_divergence(group.gate, op, site);
  join(group.gate, op, site);
  if (words == 1)
    group.brought[turn].words[lane] = *mine;
  else if (words > 1)
    std::memcpy(group.brought[turn].words + lane * words, mine, words * sizeof *mine);
  group.present[turn] |= 1u << lane;
  open_if_complete(group, warp);
  wait(group.gate, turn, op);
  return {group.brought[turn].words, group.present[turn]};
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
