// fiber.h - a stack of its own and the switch to it.
//
// A switch is a function that returns on another stack: what it saves is there. swapcontext() would do, but makes a
// system call.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "race_detector.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#ifdef __x86_64__
class Context {
 public:
  void start_at(void* stack, size_t bytes, void (*body)()) {
    constexpr int kSaved = 6;
    void** const top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack) + bytes) - 1;  // nobody to return to
    *top = nullptr, top[-1] = reinterpret_cast<void*>(body);
    for (int i = 2; i < 2 + kSaved; ++i) top[-i] = nullptr;
    sp_ = top - 1 - kSaved;
  }
  void switch_to(Context& to) { exchange(&sp_, to.sp_); }
  void prefetch_stack() const {
    for (int line = 0; line < 6; ++line) __builtin_prefetch(static_cast<const char*>(sp_) + 64 * line);
  }

 private:
  // A call for each return: anything else, setjmp() too, would have the processor guess wrongly at every level.
  __attribute__((naked, noinline)) static void exchange(void** /*from: rdi*/, void* /*to: rsi*/) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
        "mov %rsp, (%rdi); mov %rsi, %rsp\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
  }

  void* sp_ = nullptr;
};
#else
class Context {
 public:
  void start_at(void* stack, size_t bytes, void (*body)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack, context_.uc_stack.ss_size = bytes;
    makecontext(&context_, body, 0);
  }
  void switch_to(Context& to) { swapcontext(&context_, &to.context_); }
  void prefetch_stack() const {}

 private:
  ucontext_t context_{};
};
#endif

class Fiber {
 public:
  Identity identity;

  Fiber() = default;  // stands for the thread of the operating system that starts others

  explicit Fiber(void (*body)()) : owns_stack_(true) {
    constexpr size_t kPage = 4096, kLine = 64;
#ifdef __SANITIZE_ADDRESS__
    bytes_ = 64 * kPage;
#else
    bytes_ = 16 * kPage;
#endif
    stack_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack_, kPage, PROT_NONE);  // an overflow faults
    // Stacks that begin at the same offset of a page would all want the same few lines of the cache.
    static unsigned created = 0;
    context_.start_at(stack_, bytes_ - created++ % 61 * 5 * kLine, body);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (!owns_stack_) return;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_, bytes_);
#endif
    munmap(stack_, bytes_);
  }

  // Goes on in `to`, and returns when something switches back to `this`, the running fiber.
  void switch_to(Fiber& to) {
    if (this == &to) return;
#ifdef SIMT_TSAN
    Identity::become(to.identity.generic);
#endif
#ifdef __SANITIZE_ADDRESS__
    if (stack_ == nullptr) find_stack();
    __sanitizer_start_switch_fiber(&fake_stack_, to.stack_, to.bytes_);
#endif
    context_.switch_to(to.context_);
    arrived();
  }

  // Hints that it will be switched to soon, and next but one.
  void prefetch() const { __builtin_prefetch(&context_); }
  void prefetch_stack() const { context_.prefetch_stack(); }

  // The first thing that the body of a new fiber does.
  void arrived() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  void find_stack() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack_, &bytes_);
    pthread_attr_destroy(&attributes);
  }

  bool owns_stack_ = false;
  void* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  // Needed at every switch: in one line of the cache with what a derived class begins with.
  alignas(64) Context context_;
};

}  // namespace simt
