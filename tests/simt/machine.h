// machine.h - the running thread, those who wait, who comes next: what the shim's own files need of each other.
#pragma once

#include <deque>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "race_detector.h"
#include "sm80.h"

namespace simt {
inline namespace machine {

struct Thread : Fiber {  // its fiber serves one block after the other
  using Fiber::Fiber;
  uint8_t z = 0;
  uint16_t x = 0, y = 0, index = 0;  // in the block
  const Op* waits_in = nullptr;
  Site waits_at{};
  bool done = false;
  std::deque<Copy> copies{};
  int groups = 0;  // of copies, committed so far
};

// How tensor cores add: the products of an instruction in so many parts, one after the other, each with the sum so far.
// Every summand is cut off so many bits below the largest exponent, the sum of a part to the 24 bits of a float.
struct Adder {
  int parts, bits;  // no parts: exact sum, one rounding
};

struct Gate {  // those who wait for the same thing
  std::vector<Thread*> waiting{};
  const Op* op = nullptr;
  Site site{};
  int turn = 0;  // a fast thread may come to the next turn while a slow one still leaves the last
  Order order[2]{};
};

// ---- machine.cpp

extern Thread host;
extern bool async_proxy;
extern std::mt19937 rng;
extern Adder adder;

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string where(const Site& site);
[[noreturn]] void stop(const std::string& message);
[[noreturn]] void report_deadlock();

extern uint32_t shared_window;  // the address at which shared memory begins for those who ask by shared addresses
unsigned char* shared_begin();
ptrdiff_t shared_bytes();
bool happens_at_once();  // whether something asynchronous does, by SIMT_ASYNC

// ---- simt.cpp

enum Schedule { kFifo, kLifo, kRandom };
extern Schedule schedule;
extern Thread* self;   // the running one
extern unsigned live;  // threads that have not exited
extern Stats counts;

size_t choose(size_t waiting);  // whose turn it is, by the schedule
Thread& next_thread();
void switch_to(Thread& to);
void park(std::vector<Thread*>& among, const Op& op, const Site& site);
void wake(std::vector<Thread*>& waiting);
void join(Gate& gate, const Op& op, const Site& site);
void open(Gate& gate);
void wait(Gate& gate, int turn, const Op& op);

void begin_warps(const std::vector<Thread*>& threads);
void abandon_block();
void leave_block();  // the running thread does

// ---- sm90.cpp

void begin_block(unsigned threads);
bool deliver_copy();  // of TMA, when no thread can run; whether there was one
void check_thread_end();
void check_block_end();

}  // namespace machine
}  // namespace simt
