// fiber.h - a stack of its own and the switch to it. makecontext() starts a fiber; the compiler's
// own setjmp resumes it, without the system call of swapcontext().
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

#include "race_detector.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

class Fiber {
 public:
  Identity identity;

  Fiber() : started_(true) {}  // stands for the thread of the operating system that starts others

  explicit Fiber(void (*body)()) : owns_stack_(true) {
    constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
    bytes_ = 64 * kPage;
#else
    bytes_ = 16 * kPage;
#endif
    stack_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack_, kPage, PROT_NONE);  // an overflow faults
    getcontext(&start_);
    start_.uc_stack.ss_sp = stack_, start_.uc_stack.ss_size = bytes_;
    makecontext(&start_, body, 0);
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
  __attribute__((noinline)) void switch_to(Fiber& to) {
    if (this == &to) return;
#ifdef SIMT_TSAN
    Identity::become(to.identity.generic);
#endif
#ifdef __SANITIZE_ADDRESS__
    if (stack_ == nullptr) find_stack();
    __sanitizer_start_switch_fiber(&fake_stack_, to.stack_, to.bytes_);
#endif
    if (__builtin_setjmp(resume_) == 0) to.jump();
    arrived();
  }

  // The first thing that the body of a new fiber does.
  void arrived() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  __attribute__((noinline)) void jump() {
    if (started_) __builtin_longjmp(resume_, 1);
    started_ = true;
    setcontext(&start_);
  }
  void find_stack() {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack_, &bytes_);
    pthread_attr_destroy(&attributes);
  }

  bool owns_stack_ = false, started_ = false;
  void* stack_ = nullptr;
  size_t bytes_ = 0;
  ucontext_t start_{};
  void* resume_[5]{};
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace simt
