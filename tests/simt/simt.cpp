// simt.cpp - the machine behind simt.h: threads, rendezvous, schedules, asynchronous copies.
//
// It throws simt::Error out of launch(), with the kernel's source line, for
//   * a launch the driver would refuse (grid, block, shared memory);
//   * a deadlock, naming who waits where;
//   * one barrier or warp op met at two different source lines;
//   * a warp op whose mask lacks the caller, a shuffle from a lane that does not take part,
//     mma or ldmatrix without all 32 lanes;
//   * a row of ldmatrix or cp.async that is misaligned or outside shared memory;
//   * a write just outside shared memory; an asynchronous copy nobody waited for.
//
// A thread that has exited counts as arrived, as on the hardware since sm_70.
#include "simt.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "guarded_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

struct Copy {
  unsigned char* dst;
  const unsigned char* src;  // null: zeros
  int group;
};

struct Thread : Fiber {  // its fiber serves one block after the other
  using Fiber::Fiber;
  unsigned index = 0;  // in the block
  uint3 coordinates{};
  bool done = false;
  const Op* waits_in = nullptr;
  Site waits_at{};
  std::deque<Copy> copies;
  int groups = 0;  // of copies, committed so far
};

struct Gate {  // those who wait for the same thing
  std::vector<Thread*> waiting;
  const Op* op = nullptr;
  Site site{};
};

struct Group {  // the lanes of one mask
  unsigned mask;
  Gate gate{};
  int turn = 0;  // a fast lane may fill the next turn while a slow one still reads the last
  unsigned present[2]{};
  Slot slots[2][warpSize]{};
};

struct Warp {
  unsigned live = 0;
  std::deque<Group> groups;
};

// The launch.
const std::function<void()>* thread_body;
enum { kFifo, kLifo, kRandom } schedule;
bool copies_early;
std::mt19937 rng;
Stats counts;

// The block.
Thread host, *self = &host;
std::deque<Thread> pool;
std::deque<Thread*> ready;
std::deque<Warp> warps;
Gate block_gate;
unsigned live;  // threads that have not exited
GuardedMemory* shared;
std::string error;

// ---- messages

__attribute__((format(printf, 1, 0))) std::string vtext(const char* format, va_list args) {
  char buffer[1024];
  std::vsnprintf(buffer, sizeof buffer, format, args);
  return buffer;
}

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string s = vtext(format, args);
  va_end(args);
  return s;
}

std::string where(const Site& site) { return text("%s:%u", site.file_name(), site.line()); }

void switch_to(Thread& to) {
  std::exchange(self, &to)->switch_to(to);
  threadIdx = self->coordinates;
}

[[noreturn]] void stop(const std::string& message) {
  if (self == &host) throw Error(message);
  error = message;
  switch_to(host);  // it throws; this fiber never runs again
  std::abort();
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, std::vector<unsigned>> waiting;
  for (const Thread& t : pool)
    if (!t.done) waiting[t.waits_in->name + (" at " + where(t.waits_at))].push_back(t.index);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  std::string message = text("deadlock in block (%u, %u, %u), %u of %u threads have exited", blockIdx.x, blockIdx.y,
                             blockIdx.z, threads - live, threads);
  for (const auto& [what, who] : waiting)
    message += text("; %zu wait in %s (threads %u to %u)", who.size(), what.c_str(), who.front(), who.back());
  stop(message);
}

// ---- rendezvous: join, open the gate if complete, pass on

Thread& next_thread() {
  if (ready.empty() && live > 0) report_deadlock();
  if (ready.empty()) return host;
  if (schedule == kRandom) std::swap(ready.back(), ready[rng() % ready.size()]);
  Thread* const next = schedule == kFifo ? ready.front() : ready.back();
  schedule == kFifo ? ready.pop_front() : ready.pop_back();
  return *next;
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

void join(Gate& gate, const Op& op, const Site& site) {
  if (gate.waiting.empty()) {
    gate.op = &op, gate.site = site;
  } else if (gate.op != &op || !same(gate.site, site)) {
    stop(text("divergence: thread %u is in %s at %s, thread %u waits in %s at %s", self->index, op.name,
              where(site).c_str(), gate.waiting[0]->index, gate.op->name, where(gate.site).c_str()));
  }
  gate.waiting.push_back(self);
  self->waits_in = &op, self->waits_at = site;
}

void open(Gate& gate) {
  ++(counts.*gate.op->counter);
  ready.insert(ready.end(), gate.waiting.begin(), gate.waiting.end());
  gate.waiting.clear();
}

void open_if_complete(Group& group, const Warp& warp) {
  const unsigned present = group.present[group.turn];
  if (group.gate.waiting.empty() || present != (group.mask & warp.live)) return;
  if (group.gate.op->whole_warp && present != ~0u)
    stop(text("%s: %s by lanes %08x; it needs the whole warp", where(group.gate.site).c_str(), group.gate.op->name,
              present));
  open(group.gate);
  group.turn ^= 1;
  group.present[group.turn] = 0;
}

void open_block_gate_if_complete() {
  if (live > 0 && block_gate.waiting.size() == live) open(block_gate);
}

// ---- the life of a thread and of a block

void exit_thread() {
  if (!self->copies.empty()) stop(text("thread %u exits before its asynchronous copies have arrived", self->index));
  Warp& warp = warps[self->index / warpSize];
  self->done = true;
  warp.live &= ~(1u << self->index % warpSize);
  --live;
  for (Group& group : warp.groups) open_if_complete(group, warp);
  open_block_gate_if_complete();
}

void thread_main() {
  self->arrived();
  threadIdx = self->coordinates;
  for (;;) {  // once per block
    (*thread_body)();
    exit_thread();
    switch_to(next_thread());
  }
}

void run_block(unsigned threads) {
  while (pool.size() < threads) {
    const auto index = static_cast<unsigned>(pool.size());
    pool.emplace_back(thread_main).index = index;
  }
  live = threads;
  block_gate.waiting.clear();
  warps.assign((threads + warpSize - 1) / warpSize, Warp{});
  for (Thread& t : pool) {
    t.done = t.index >= threads, t.groups = 0;
    if (t.done) continue;
    const unsigned row = t.index / blockDim.x;
    t.coordinates = {t.index % blockDim.x, row % blockDim.y, row / blockDim.y};
    warps[t.index / warpSize].live |= 1u << t.index % warpSize;
    ready.push_back(&t);
  }
  switch_to(next_thread());
  if (error.empty()) return;
  ready.clear(), pool.clear();  // its fibers stand in the middle of a kernel
  throw Error(std::exchange(error, {}));
}

void read_environment() {
  const auto value = [](const char* name, const char* otherwise) {
    const char* v = std::getenv(name);
    return std::string(v ? v : otherwise);
  };
  const std::string s = value("SIMT_SCHED", "fifo"), c = value("SIMT_ASYNC", "late");
  if (s != "fifo" && s != "lifo" && s != "random") stop("SIMT_SCHED: fifo, lifo or random");
  if (c != "late" && c != "early") stop("SIMT_ASYNC: late or early");
  schedule = s == "lifo" ? kLifo : s == "random" ? kRandom : kFifo;
  copies_early = c == "early";
  rng.seed(static_cast<unsigned>(std::atoi(value("SIMT_SEED", "0").c_str())));
}

void copy_16(const Copy& c) { c.src ? std::memcpy(c.dst, c.src, 16) : std::memset(c.dst, 0, 16); }

}  // namespace

// ---- what simt.h declares

const Stats& stats() { return counts; }
unsigned char* shared_memory() { return shared->begin(); }

void fail(const Site& site, const char* format, ...) {
  va_list args;
  va_start(args, format);
  const std::string message = vtext(format, args);
  va_end(args);
  stop(where(site) + ": " + message);
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      threads < 1 || threads > 1024 || block.z > 64 || shared_bytes > 227 * 1024)
    stop(text("launch refused: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes shared", grid.x, grid.y, grid.z,
              block.x, block.y, block.z, shared_bytes));
  read_environment();
  counts = {};
  thread_body = &thread, blockDim = block, gridDim = grid;
  GuardedMemory memory(shared_bytes);
  shared = &memory;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        memory.poison();
        run_block(static_cast<unsigned>(threads));
        if (const auto byte = memory.overrun())
          stop(text("block (%u, %u, %u) wrote byte %td of its %zu bytes of shared memory", blockIdx.x, blockIdx.y,
                    blockIdx.z, *byte, shared_bytes));
      }
}

void block_barrier(const Site& site) {
  join(block_gate, kSyncthreads, site);
  open_block_gate_if_complete();
  switch_to(next_thread());
}

Gathered warp_op(const Op& op, unsigned mask, const void* mine, size_t bytes, const Site& site) {
  const unsigned lane = self->index % warpSize;
  if (!(mask >> lane & 1)) fail(site, "%s by lane %u, which mask %08x lacks", op.name, lane, mask);
  Warp& warp = warps[self->index / warpSize];
  const auto found =
      std::find_if(warp.groups.begin(), warp.groups.end(), [&](const Group& g) { return g.mask == mask; });
  Group& group = found != warp.groups.end() ? *found : warp.groups.emplace_back(Group{mask});
  const int turn = group.turn;
  join(group.gate, op, site);
  if (bytes > 0) std::memcpy(group.slots[turn][lane].bytes, mine, bytes);
  group.present[turn] |= 1u << lane;
  open_if_complete(group, warp);
  switch_to(next_thread());
  return {group.slots[turn], group.present[turn]};
}

void check_shared_row(const void* row, const char* what, const Site& site) {
  const ptrdiff_t at = static_cast<const unsigned char*>(row) - shared->begin();
  const size_t size = shared->size();
  if (at < 0 || at + 16 > static_cast<ptrdiff_t>(size))
    fail(site, "%s: byte %td is outside the %zu bytes of shared memory", what, at, size);
  if (at % 16 != 0) fail(site, "%s: byte %td of shared memory is not 16-byte aligned", what, at);
}

void count_conflicts(const Gathered& rows, int matrices) {  // 8 rows, 8 columns of 16 bytes
  for (int j = 0; j < matrices; ++j) {
    unsigned columns = 0;
    for (int i = 8 * j; i < 8 * j + 8; ++i)
      columns |= 1u << (reinterpret_cast<uintptr_t>(rows.at<const void*>(i)) / 16 % 8);
    counts.ldmatrix_conflicts += 8 - __builtin_popcount(columns);
  }
}

void copy_async(void* dst, const void* src, bool pred, const Site& site) {
  check_shared_row(dst, "cp.async", site);
  if (pred && reinterpret_cast<uintptr_t>(src) % 16 != 0) fail(site, "cp.async: the source is not 16-byte aligned");
  ++counts.cp_async;
  const Copy copy{static_cast<unsigned char*>(dst), pred ? static_cast<const unsigned char*>(src) : nullptr,
                  self->groups};
  copies_early ? copy_16(copy) : self->copies.push_back(copy);
}

void copy_commit() { ++self->groups; }

void copy_wait(int groups_left) {
  std::deque<Copy>& copies = self->copies;
  for (; !copies.empty() && copies.front().group < self->groups - groups_left; copies.pop_front())
    copy_16(copies.front());
}

}  // namespace simt

// For tests that load the emulated kernels as a library: a counter of the latest launch by name.
extern "C" __attribute__((visibility("default"))) long simt_count(const char* name) {
  using simt::Stats;
  static const std::map<std::string, long Stats::*> counters{{"mma", &Stats::mma},
                                                             {"ldmatrix", &Stats::ldmatrix},
                                                             {"ldmatrix_conflicts", &Stats::ldmatrix_conflicts},
                                                             {"shuffles", &Stats::shuffles},
                                                             {"votes", &Stats::votes},
                                                             {"warp_barriers", &Stats::warp_barriers},
                                                             {"block_barriers", &Stats::block_barriers},
                                                             {"cp_async", &Stats::cp_async}};
  const auto found = counters.find(name);
  return found == counters.end() ? -1 : simt::stats().*found->second;
}
