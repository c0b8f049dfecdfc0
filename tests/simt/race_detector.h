// race_detector.h - what ThreadSanitizer is told about CUDA threads. Without SIMT_TSAN all of it is empty.
//
// Every CUDA thread is a thread of its own to it, and those of a block are ordered by barriers alone. Identities are
// dear, so blocks of even and of odd number share two sets of them: neighbours are ordered by nothing. A thread may
// have a second identity, the asynchronous proxy, through which wgmma reads shared memory: barriers order each of the
// two by itself, only fence.proxy.async and the end of an asynchronous operation join them. A copy of TMA belongs to
// the asynchronous proxy of the thread that asks for it, and when it has arrived, both proxies of others know of it.
#pragma once

#include <memory>
#include <vector>

#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace simt {

#ifdef SIMT_TSAN
inline constexpr bool kDetectsRaces = true;

struct Identity {
  void *generic = nullptr, *async = nullptr, *made = nullptr;  // the last: `async` of a launch that models it

  void model_async(bool wanted) {
    if (wanted && made == nullptr) made = __tsan_create_fiber(0);
    async = wanted ? made : nullptr;
  }
  // f() as the asynchronous proxy, if it is modelled.
  template <typename F>
  void as_async(F&& f) const {
    if (async == nullptr) return;
    become(async), f(), become(generic);
  }
  // f() as this identity, ordered with nobody.
  template <typename F>
  void act(F&& f) const {
    void* const other = __tsan_get_current_fiber();
    become(generic), f(), become(other);
  }
  // Around a single access that the asynchronous proxy makes, if it is modelled.
  void enter_async() const {
    if (async != nullptr) become(async);
  }
  void leave_async() const {
    if (async != nullptr) become(generic);
  }
  Identity of_both_proxies() const { return {generic, generic}; }
  static void become(void* other) { __tsan_switch_to_fiber(other, __tsan_switch_to_fiber_no_sync); }
};

// Whoever releases is ordered before whoever acquires later.
class Order {
 public:
  void release(const Identity& who) {
    __tsan_release(&at_[0]);
    who.as_async([this] { __tsan_release(&at_[1]); });
  }
  void acquire(const Identity& who) {
    __tsan_acquire(&at_[0]);
    who.as_async([this] { __tsan_acquire(&at_[1]); });
  }
  // What the asynchronous proxies of those who released have seen is before the running identity.
  void acquire_async() { __tsan_acquire(&at_[1]); }
  // The two proxies of one thread see each other's accesses.
  void join(const Identity& who) {
    __tsan_release(&at_[0]);
    who.as_async([this] { __tsan_acquire(&at_[0]), __tsan_release(&at_[0]); });
    __tsan_acquire(&at_[0]);
  }
  // What the asynchronous proxy of a thread was asked to do is over for its generic one.
  void complete(const Identity& who) {
    who.as_async([this] { __tsan_release(&at_[1]); });
    __tsan_acquire(&at_[1]);
  }

 private:
  std::unique_ptr<char[]> at_{new char[2]};  // freed, it is forgotten: no order survives a block
};

// The shim's own reads and writes, through functions that the sanitizer intercepts, are nobody's.
struct Unobserved {
  Unobserved() { __tsan_ignore_thread_begin(); }
  ~Unobserved() { __tsan_ignore_thread_end(); }
};

inline Identity host_identity() { return {__tsan_get_current_fiber()}; }
inline Identity new_identity() { return {__tsan_create_fiber(0)}; }  // for ever: else it is given to somebody else

#else
inline constexpr bool kDetectsRaces = false;

struct Identity {
  void model_async(bool) {}
  template <typename F>
  void as_async(F&&) const {}
  template <typename F>
  void act(F&& f) const {
    f();
  }
  void enter_async() const {}
  void leave_async() const {}
  Identity of_both_proxies() const { return {}; }
};
struct Order {
  void release(const Identity&) {}
  void acquire(const Identity&) {}
  void acquire_async() {}
  void join(const Identity&) {}
  void complete(const Identity&) {}
};
struct Unobserved {
  Unobserved() {}
};
inline Identity host_identity() { return {}; }
inline Identity new_identity() { return {}; }
#endif

}  // namespace simt
