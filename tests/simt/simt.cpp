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
// and what sm90.cpp adds. A thread that has exited counts as arrived, as on the hardware since sm_70.
//
// Under ThreadSanitizer (SIMT_TSAN) every CUDA thread of every block is a thread to it, and only barriers order their
// memory. This file is compiled without its instrumentation: the shim's own books neither race nor order anything.
#include "simt.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <utility>

#include "guarded_memory.h"
#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
inline namespace machine {

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

// The launch.
const std::function<void()>* thread_body;
enum { kFifo, kLifo, kRandom } schedule;
enum { kLate, kEarly, kEither } arrival;
bool async_proxy;
std::mt19937 rng;
Stats counts;

// The block.
struct Crew {  // whoever takes a block; two that take turns are strangers to a race detector
  std::deque<Thread> threads;
  std::optional<GuardedMemory> memory;
  Order order;  // of its blocks, one after the other
};
constexpr unsigned kCrews = kDetectsRaces ? 2 : 1;
std::array<Crew, kCrews> crews;
Crew* crew = &crews[0];
Thread host, *self = &host;
std::deque<Thread*> ready;
std::deque<Warp> warps;
Gate block_gate;
unsigned live;  // threads that have not exited
std::string error;

// ---- messages

__attribute__((format(printf, 1, 0))) std::string vtext(const char* format, va_list args) {
  char buffer[1024];
  std::vsnprintf(buffer, sizeof buffer, format, args);
  return buffer;
}

std::string text(const char* format, ...) {
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
  for (const Thread& t : crew->threads)
    if (!t.done) waiting[t.waits_in->name + (" at " + where(t.waits_at))].push_back(t.index);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  std::string message = text("deadlock in block (%u, %u, %u), %u of %u threads have exited", blockIdx.x, blockIdx.y,
                             blockIdx.z, threads - live, threads);
  for (const auto& [what, who] : waiting)
    message += text("; %zu wait in %s (threads %u to %u)", who.size(), what.c_str(), who.front(), who.back());
  stop(message);
}

// ---- rendezvous: join, open the gate if complete, pass on

uint32_t shared_window;
unsigned char* shared_begin() { return crew->memory->begin(); }
ptrdiff_t shared_bytes() { return static_cast<ptrdiff_t>(crew->memory->size()); }

size_t choose(size_t waiting) { return schedule == kFifo ? 0 : schedule == kLifo ? waiting - 1 : rng() % waiting; }

bool happens_at_once() { return arrival == kEarly || (arrival == kEither && rng() % 2 == 0); }

Thread& next_thread() {
  while (ready.empty() && live > 0)
    if (!deliver_copy()) report_deadlock();
  if (ready.empty()) return host;
  if (schedule == kRandom) std::swap(ready.back(), ready[rng() % ready.size()]);
  Thread* const next = schedule == kFifo ? ready.front() : ready.back();
  schedule == kFifo ? ready.pop_front() : ready.pop_back();
  return *next;
}

void park(std::vector<Thread*>& among, const Op& op, const Site& site) {
  among.push_back(self);
  self->waits_in = &op, self->waits_at = site;
  switch_to(next_thread());
}
void wake(std::vector<Thread*>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
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

void open_if_complete(Group& group, const Warp& warp) {
  const unsigned present = group.present[group.gate.turn];
  if (group.gate.waiting.empty() || present != (group.mask & warp.live)) return;
  if (group.gate.op->whole_warp && present != ~0u)
    stop(text("%s: %s by lanes %08x; it needs the whole warp", where(group.gate.site).c_str(), group.gate.op->name,
              present));
  open(group.gate);
  group.present[group.gate.turn] = 0;
}

void open_block_gate_if_complete() {
  if (live > 0 && block_gate.waiting.size() == live) open(block_gate);
}

// ---- the life of a thread and of a block

void exit_thread() {
  check_thread_end();
  if (!self->copies.empty()) stop(text("thread %u exits before its asynchronous copies have arrived", self->index));
  Warp& warp = warps[self->index / warpSize];
  self->done = true;
  crew->order.release(self->identity);
  warp.live &= ~(1u << self->index % warpSize);
  --live;
  for (Group& group : warp.groups) open_if_complete(group, warp);
  open_block_gate_if_complete();
}

void thread_main() {
  self->arrived();
  threadIdx = self->coordinates;
  for (;;) {  // once per block
    crew->order.acquire(self->identity);
    (*thread_body)();
    Thread* next = nullptr;
    {
      const Unobserved books;
      exit_thread();
      next = &next_thread();
    }
    switch_to(*next);
  }
}

void run_block(unsigned threads) {
  while (crew->threads.size() < threads) {
    Thread& t = crew->threads.emplace_back(thread_main);
    t.index = static_cast<unsigned>(crew->threads.size() - 1);
    t.identity = new_identity(async_proxy);
  }
  live = threads;
  begin_block(threads);
  block_gate = Gate{};
  warps.clear(), warps.resize((threads + warpSize - 1) / warpSize);
  for (Thread& t : crew->threads) {
    t.done = t.index >= threads, t.groups = 0;
    if (t.done) continue;
    const unsigned row = t.index / blockDim.x;
    t.coordinates = {t.index % blockDim.x, row % blockDim.y, row / blockDim.y};
    warps[t.index / warpSize].live |= 1u << t.index % warpSize;
    ready.push_back(&t);
  }
  switch_to(next_thread());
  if (error.empty()) return check_block_end();
  ready.clear(), crew->threads.clear();  // its fibers stand in the middle of a kernel
  throw Error(std::exchange(error, {}));
}

void read_environment() {
  const auto value = [](const char* name, const char* otherwise) {
    const char* v = std::getenv(name);
    return std::string(v ? v : otherwise);
  };
  const std::string s = value("SIMT_SCHED", "fifo"), c = value("SIMT_ASYNC", "late"), p = value("SIMT_PROXY", "0");
  if (s != "fifo" && s != "lifo" && s != "random") stop("SIMT_SCHED: fifo, lifo or random");
  if (c != "late" && c != "early" && c != "random") stop("SIMT_ASYNC: late, early or random");
  if (p != "0" && p != "1") stop("SIMT_PROXY: 0 or 1");
  schedule = s == "lifo" ? kLifo : s == "random" ? kRandom : kFifo;
  arrival = c == "early" ? kEarly : c == "random" ? kEither : kLate, async_proxy = p == "1";
  rng.seed(static_cast<unsigned>(std::atoi(value("SIMT_SEED", "0").c_str())));
}

}  // namespace machine

// ---- what simt.h declares

const Stats& stats() { return counts; }
unsigned char* shared_memory(unsigned alignment) {
  shared_window = 1024 + alignment % 1024;  // aligned to that and no more
  return shared_begin();
}

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
  const Unobserved books;
  read_environment();
  counts = {};
  thread_body = &thread, blockDim = block, gridDim = grid;
  host.identity = host_identity();
  for (Crew& c : crews) {
    c.memory.emplace(shared_bytes);
    c.order = Order();
    c.order.release(host.identity);
  }
  unsigned number = 0;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        crew = &crews[number++ % kCrews];
        crew->memory->poison();
        run_block(static_cast<unsigned>(threads));
        if (const auto byte = crew->memory->overrun())
          stop(text("block (%u, %u, %u) wrote byte %td of its %zu bytes of shared memory", blockIdx.x, blockIdx.y,
                    blockIdx.z, *byte, shared_bytes));
      }
  for (Crew& c : crews) c.order.acquire(host.identity);
}

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

void check_shared_row(const void* row, const char* what, const Site& site) {
  const ptrdiff_t at = static_cast<const unsigned char*>(row) - crew->memory->begin();
  const size_t size = crew->memory->size();
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

bool start_copy(const void* dst, const void* src, const Site& site) {
  const Unobserved books;
  check_shared_row(dst, "cp.async", site);
  if (reinterpret_cast<uintptr_t>(src) % 16 != 0) fail(site, "cp.async: the source is not 16-byte aligned");
  ++counts.cp_async;
  if (happens_at_once()) return true;
  self->copies.push_back({const_cast<void*>(dst), src, self->groups});
  return false;
}

void copy_commit() { ++self->groups; }

bool next_copy(int groups_left, Copy& copy) {
  const Unobserved books;
  std::deque<Copy>& copies = self->copies;
  if (copies.empty() || copies.front().group >= self->groups - groups_left) return false;
  copy = copies.front();
  copies.pop_front();
  return true;
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
                                                             {"cp_async", &Stats::cp_async},
                                                             {"stmatrix", &Stats::stmatrix},
                                                             {"named_barriers", &Stats::named_barriers},
                                                             {"tma", &Stats::tma},
                                                             {"wgmma", &Stats::wgmma}};
  const auto found = counters.find(name);
  return found == counters.end() ? -1 : simt::stats().*found->second;
}
