// sm90.cpp - the books of sm90.h: who waits at which barrier, what is on its way.
//
// It throws simt::Error, with the kernel's source line, for an mbarrier used before it is initialised or, by TMA,
// before a fence; arrivals and bytes it did not expect; a copy to a misaligned place, out of shared memory, or not
// waited for; wgmma by less than a warpgroup or without wgmma_fence, a matrix out of shared memory or off its swizzle,
// accumulators or operands touched before wgmma_wait; a named barrier with an id, or threads, that it cannot have.
#include "sm90.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <utility>

#include "machine.h"

namespace simt {
namespace {

struct Mbarrier {
  int count, pending = count;
  long bytes = 0;  // that have still to arrive
  unsigned phase = 0;
  const Thread* hidden_in = self;  // until it has been shown to TMA
  std::vector<Thread*> waiting{};
  Order order[2]{};
};

struct Transfer {
  Mbarrier* bar;
  int bytes;
  std::function<void()> copy;
  Site site;
  Order order{};
};

struct Product {
  float* d;
  std::function<void(float*)> compute;
  int group;
};
struct Accumulators {  // their values while the kernel may not see them
  std::vector<float> values;
  int products = 0;
  Site site{};
};
struct Asynchronous {  // of a thread; a block makes them for all its threads, so nothing here allocates
  std::vector<Product> products{};
  std::map<float*, Accumulators> hidden{};
  int groups = 0;
  bool fenced = false;
  Order proxies{};
};

struct NamedBarrier {
  Gate gate{};
  int threads = 0, arrived = 0;
};

constexpr Op kConverge{"named_barrier", &Stats::warpgroup_syncs, true};
constexpr Op kNamedBarrier{"named_barrier", &Stats::named_barriers, false, true};
constexpr Op kMbarrierWait{"mbarrier_wait", nullptr};

std::map<const void*, Mbarrier> mbarriers;
std::deque<Transfer> transfers;
std::array<NamedBarrier, 16> named_barriers;
std::vector<Gate> warpgroups;
std::vector<Asynchronous> asynchronous;
unsigned block_threads;

ptrdiff_t byte_of(const void* p) { return static_cast<const unsigned char*>(p) - shared_begin(); }

void settle(Mbarrier& bar) {
  if (bar.pending > 0 || bar.bytes != 0) return;
  ++bar.phase, bar.pending = bar.count;
  wake(bar.waiting);
}

// Every copy is somebody of its own to a race detector; a few take turns.
const Identity& next_engine() {
  static std::array<Identity, kDetectsRaces ? 32 : 1> engines;
  static size_t created = 0, next = 0;
  if (created < engines.size()) engines[created++] = new_identity();
  next = (next + 1) % created;
  return engines[next];
}

void deliver(Transfer& t) {
  const Identity& engine = next_engine();
  const Identity seen = async_proxy ? engine.of_both_proxies() : engine;
  engine.act([&] {
    async_proxy ? t.order.acquire_async() : t.order.acquire(engine);
    t.copy();
    t.bar->order[t.bar->phase % 2].release(seen);
  });
  t.bar->bytes -= t.bytes;
  if (t.bar->pending == 0 && t.bar->bytes < 0)
    fail(t.site, "tma_load brings %ld bytes more than its mbarrier expects", -t.bar->bytes);
  settle(*t.bar);
}

Asynchronous& mine() { return asynchronous[self->index]; }

void check_hidden(const float* d, const Accumulators& sums) {
  const auto poisoned = [](float x) { return __builtin_bit_cast(uint32_t, x) == ~0u; };
  if (!std::all_of(d, d + sums.values.size(), poisoned))
    fail(sums.site, "wrote to the accumulators of this wgmma before wgmma_wait");
}

// Of the oldest product, when no more than so many groups may be under way; false if there is none.
bool finish_one(int groups_left) {
  std::optional<Unobserved> books{std::in_place};
  Asynchronous& thread = mine();
  if (thread.products.empty() || thread.products.front().group >= thread.groups - groups_left) return false;
  const Product product = std::move(thread.products.front());
  thread.products.erase(thread.products.begin());
  const auto at = thread.hidden.find(product.d);
  Accumulators& sums = at->second;
  books.reset();
  product.compute(sums.values.data());
  books.emplace();
  if (--sums.products > 0) return true;
  check_hidden(product.d, sums);
  std::copy(sums.values.begin(), sums.values.end(), product.d);
  thread.hidden.erase(at);
  return true;
}

}  // namespace

// ---- what machine.h declares

inline namespace machine {

void begin_block(unsigned threads) {
  block_threads = threads;
  mbarriers.clear(), transfers.clear();
  named_barriers = {};
  warpgroups.clear(), warpgroups.resize((threads + 127) / 128);
  asynchronous.clear(), asynchronous.resize(threads);
}

bool deliver_copy() {
  if (transfers.empty()) return false;
  const auto chosen = transfers.begin() + static_cast<ptrdiff_t>(choose(transfers.size()));
  Transfer t = std::move(*chosen);
  transfers.erase(chosen);
  deliver(t);
  return true;
}

void check_thread_end() {
  if (!mine().products.empty()) stop(text("thread %u exits before its wgmma has been waited for", self->index));
}

void check_block_end() {
  if (!transfers.empty())
    stop(where(transfers.front().site) + text(": the block ends with %zu copies of TMA in flight", transfers.size()));
  for (const auto& [at, bar] : mbarriers)
    if (bar.bytes != 0)
      stop(text("the block ends with %ld bytes expected by the mbarrier at byte %td", bar.bytes, byte_of(at)));
}

}  // namespace machine

// ---- what sm90.h declares

void check_shared(const void* p, int bytes, int alignment, const char* what, const Site& site) {
  const ptrdiff_t at = byte_of(p), size = shared_bytes();
  if (shared_address(p) % static_cast<unsigned>(alignment) != 0)
    fail(site, "%s: byte %td of shared memory is not %d-byte aligned", what, at, alignment);
  if (at < 0 || at + bytes > size)
    fail(site, "%s: bytes %td to %td are outside the %td bytes of shared memory", what, at, at + bytes - 1, size);
}

uint32_t shared_address(const void* p) { return shared_window + static_cast<uint32_t>(byte_of(p)); }

void* shared_pointer(uint32_t address, const Site& site) {
  void* const p = shared_begin() + (static_cast<ptrdiff_t>(address) - shared_window);
  check_shared(p, 1, 1, "an operand", site);
  return p;
}

void named_barrier(int id, int threads, bool waits, const Site& site) {
  const Unobserved books;
  if (id < 1 || id > 15) fail(site, "named barrier %d: there are 1 to 15, 0 is that of __syncthreads", id);
  if (threads < 32 || threads % 32 != 0 || threads > static_cast<int>(block_threads))
    fail(site, "named barrier %d: %d threads are not some of the block's warps", id, threads);
  warp_op(kConverge, ~0u, nullptr, 0, site);
  NamedBarrier& b = named_barriers[static_cast<size_t>(id)];
  if (b.arrived > 0 && b.threads != threads)
    fail(site, "named barrier %d: of %d threads here, of %d elsewhere", id, threads, b.threads);
  const int turn = b.gate.turn;
  b.threads = threads, b.gate.op = &kNamedBarrier;
  b.gate.order[turn].release(self->identity);
  if (waits) b.gate.waiting.push_back(self), self->waits_in = &kNamedBarrier, self->waits_at = site;
  if (++b.arrived == threads) b.arrived = 0, open(b.gate);
  if (waits) machine::wait(b.gate, turn, kNamedBarrier);
}

void warpgroup_op(const Op& op, const Site& site) {
  const Unobserved books;
  const unsigned number = self->index / 128;
  if (128 * (number + 1) > block_threads) fail(site, "%s: not in a whole warpgroup", op.name);
  Gate& gate = warpgroups[number];
  const int turn = gate.turn;
  join(gate, op, site);
  if (gate.waiting.size() == 128) open(gate);
  machine::wait(gate, turn, op);
}

void mbarrier_init(const void* bar, int count, const Site& site) {
  const Unobserved books;
  if (!mbarriers.try_emplace(bar, Mbarrier{count}).second) fail(site, "this mbarrier has been initialised before");
}

void mbarrier_arrive(const void* bar, int bytes, const Site& site) {
  const Unobserved books;
  Mbarrier& b = mbarriers.at(bar);
  if (b.pending == 0) fail(site, "arrives where all %d have arrived", b.count);
  b.order[b.phase % 2].release(self->identity);
  --b.pending, b.bytes += bytes;
  settle(b);
}

void mbarrier_wait(const void* bar, int parity, const Site& site) {
  const Unobserved books;
  if (parity != 0 && parity != 1) fail(site, "mbarrier_wait for parity %d", parity);
  Mbarrier& b = mbarriers.at(bar);
  while (b.phase % 2 == static_cast<unsigned>(parity)) park(b.waiting, kMbarrierWait, site);
  b.order[parity].acquire(self->identity);
}

void show_mbarriers() {
  const Unobserved books;
  for (auto& [at, bar] : mbarriers)
    if (bar.hidden_in == self) bar.hidden_in = nullptr;
}

void start_copy(const void* bar, int bytes, const std::function<void()>& copy, const Site& site) {
  const Unobserved books;
  Mbarrier& b = mbarriers.at(bar);
  if (b.hidden_in != nullptr) fail(site, "tma_load on an mbarrier that mbarrier_fence_init has not shown to it");
  ++counts.tma;
  Transfer t{&b, bytes, copy, site};  // made here, it is nobody's
  t.order.release(self->identity);
  if (happens_at_once())
    deliver(t);
  else
    transfers.push_back(std::move(t));
}

void fence_proxies() {
  const Unobserved books;
  mine().proxies.join(self->identity);
  show_mbarriers();
}

void enter_async_proxy() { self->identity.enter_async(); }
void leave_async_proxy() { self->identity.leave_async(); }

void wgmma_fence(const Site& site) {
  const Unobserved books;
  warp_op(kWgmmaSync, ~0u, nullptr, 0, site);
  mine().fenced = true;
}

bool start_product(float* d, int registers, std::function<void(float*)>& product, const Site& site) {
  const Unobserved books;
  Asynchronous& thread = mine();
  if (!thread.fenced) fail(site, "comes to wgmma without wgmma_fence since its last wgmma_commit");
  if (thread.products.empty() && happens_at_once()) return true;  // none overtakes another
  const auto [at, fresh] = thread.hidden.try_emplace(d);
  Accumulators& sums = at->second;
  if (fresh) sums.values.assign(d, d + registers), std::memset(d, 0xff, sums.values.size() * sizeof *d);
  check_hidden(d, sums);
  if (sums.values.size() != static_cast<size_t>(registers))
    fail(site, "uses accumulators of another shape before wgmma_wait");
  sums.site = site, ++sums.products;
  thread.products.push_back({d, std::move(product), thread.groups});
  return false;
}

void wgmma_commit() {
  ++mine().groups;
  mine().fenced = false;
}

void wgmma_wait(int groups_left, const Site& site) {
  {
    const Unobserved books;
    warp_op(kWgmmaSync, ~0u, nullptr, 0, site);
  }
  while (finish_one(groups_left)) continue;
  const Unobserved books;
  mine().proxies.complete(self->identity);
}

}  // namespace simt
