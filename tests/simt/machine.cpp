// machine.cpp - threads of a launch, block after block.
//
// It throws simt::Error out of launch(), with the kernel's source line, for
//   * a launch the driver would refuse (grid, block, shared memory);
//   * a deadlock, naming who waits where;
//   * a write just outside shared memory;
// and for what simt.cpp, sm80.cpp and sm90.cpp add.
//
// Under ThreadSanitizer (SIMT_TSAN) every CUDA thread is a thread to it, and only barriers order their memory. The
// shim's .cpp files are compiled without its instrumentation: its own books neither race nor order anything.
#include "machine.h"

#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <utility>

#include "guarded_memory.h"

uint3 blockIdx;
dim3 blockDim, gridDim;

namespace simt {
inline namespace machine {
namespace {

// The launch.
const std::function<void()>* thread_body;
enum { kLate, kEarly, kEither } arrival;

// The block.
struct Crew {  // whoever takes a block; two that take turns are strangers to a race detector
  std::deque<Thread> threads;
  std::optional<GuardedMemory> memory;
  Order order;  // of its blocks, one after the other
};
constexpr unsigned kCrews = kDetectsRaces ? 2 : 1;
std::array<Crew, kCrews> crews;
Crew* crew = &crews[0];
std::string error;

}  // namespace

Thread host;
bool async_proxy;
std::mt19937 rng;
Adder adder;
uint32_t shared_window;

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

unsigned char* shared_begin() { return crew->memory->begin(); }
ptrdiff_t shared_bytes() { return static_cast<ptrdiff_t>(crew->memory->size()); }

bool happens_at_once() { return arrival == kEarly || (arrival == kEither && rng() % 2 == 0); }

// ---- the life of a thread and of a block

namespace {

void exit_thread() {
  self->done = true;
  crew->order.release(self->identity);
  leave_block();
}

void thread_main() {
  self->arrived();
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
    t.index = static_cast<uint16_t>(crew->threads.size() - 1);
    t.identity = new_identity();
  }
  std::vector<Thread*> present;
  for (Thread& t : crew->threads) {
    t.done = t.index >= threads, t.groups = 0;
    if (t.done) continue;
    t.identity.model_async(async_proxy);
    const unsigned row = t.index / blockDim.x;
    t.x = static_cast<uint16_t>(t.index % blockDim.x), t.y = static_cast<uint16_t>(row % blockDim.y);
    t.z = static_cast<uint8_t>(row / blockDim.y);
    present.push_back(&t);
  }
  begin_warps(present), begin_block(threads);
  switch_to(next_thread());
  if (error.empty()) return check_block_end();
  abandon_block(), crew->threads.clear();  // its fibers stand in the middle of a kernel
  throw Error(std::exchange(error, {}));
}

void read_environment() {
  const auto value = [](const char* name, const char* otherwise) {
    const char* v = std::getenv(name);
    return std::string(v ? v : otherwise);
  };
  const std::string s = value("SIMT_SCHED", "fifo"), c = value("SIMT_ASYNC", "late"), p = value("SIMT_PROXY", "0");
  const std::string m = value("SIMT_MMA", "sm80");
  if (s != "fifo" && s != "lifo" && s != "random") stop("SIMT_SCHED: fifo, lifo or random");
  if (c != "late" && c != "early" && c != "random") stop("SIMT_ASYNC: late, early or random");
  if (m != "sm80" && m != "sm90" && m != "exact") stop("SIMT_MMA: sm80, sm90 or exact");
  if (p != "0" && p != "1") stop("SIMT_PROXY: 0 or 1");
  schedule = s == "lifo" ? kLifo : s == "random" ? kRandom : kFifo;
  arrival = c == "early" ? kEarly : c == "random" ? kEither : kLate, async_proxy = p == "1";
  adder = m == "sm80" ? Adder{2, 24} : m == "sm90" ? Adder{1, 25} : Adder{};
  rng.seed(static_cast<unsigned>(std::atoi(value("SIMT_SEED", "0").c_str())));
}

}  // namespace
}  // namespace machine

unsigned char* shared_memory(unsigned alignment) {
  shared_window = 1024 + alignment % 1024;  // aligned to that and no more
  return shared_begin();
}

void fail(const Site& site, const char* format, ...) {
  va_list args;
  va_start(args, format);
  const std::string message = vtext(format, args);
  va_end(args);
  const std::string who =
      self == &host ? "" : text(" (thread %u of block %u, %u, %u)", self->index, blockIdx.x, blockIdx.y, blockIdx.z);
  stop(where(site) + ": " + message + who);
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
  thread_body = &thread, blockDim = block, gridDim = grid;
  host.identity = host_identity();
  const Identity outside = host.identity.of_both_proxies();  // launches are ordered whatever their proxies
  for (Crew& c : crews) {
    c.memory.emplace(shared_bytes);
    c.order = Order();
    c.order.release(outside);
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
  for (Crew& c : crews) c.order.acquire(outside);
}

}  // namespace simt
