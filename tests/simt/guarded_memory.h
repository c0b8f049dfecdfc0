// guarded_memory.h - shared memory of one block: guard | exactly the bytes asked for | guard.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

class GuardedMemory {
 public:
  explicit GuardedMemory(size_t size) : memory_(kPage + kGuard + size + kGuard), size_(size) {
    const size_t page = (reinterpret_cast<uintptr_t>(memory_.data()) + kPage - 1) / kPage * kPage;
    begin_ = reinterpret_cast<unsigned char*>(page) + kGuard;
    guards_ = {begin_ - kGuard, begin_ + size};
    pattern_.fill(0x7ffe);  // NaN in every type, and not the poison of the inside
  }
  ~GuardedMemory() { forbid_guards(false); }

  unsigned char* begin() const { return begin_; }
  size_t size() const { return size_; }

  void poison() {
    // NaN in every floating point type; as an integer large and positive: no index that happens to be refused.
    for (size_t i = 0; i < size_; ++i) begin_[i] = i % 2 ? 0x7f : 0xff;
    for (unsigned char* guard : guards_) std::memcpy(guard, pattern_.data(), kGuard);
    forbid_guards(true);
  }

  // The first byte that was written outside, counted from begin().
  std::optional<ptrdiff_t> overrun() {
    forbid_guards(false);
    const auto* want = reinterpret_cast<const unsigned char*>(pattern_.data());
    for (unsigned char* guard : guards_)
      if (std::memcmp(guard, want, kGuard) != 0) return std::mismatch(guard, guard + kGuard, want).first - begin_;
    return std::nullopt;
  }

 private:
  static constexpr size_t kPage = 4096;
  static constexpr size_t kGuard = kPage + 16;  // so that begin() is aligned to 16 and no more

  void forbid_guards([[maybe_unused]] bool forbid) {  // AddressSanitizer then names the culprit
#ifdef __SANITIZE_ADDRESS__
    for (unsigned char* guard : guards_)
      if (forbid)
        __asan_poison_memory_region(guard, kGuard);
      else
        __asan_unpoison_memory_region(guard, kGuard);
#endif
  }

  std::vector<unsigned char> memory_;
  size_t size_;
  unsigned char* begin_;
  std::array<unsigned char*, 2> guards_;
  std::array<uint16_t, kGuard / 2> pattern_;
};

}  // namespace simt
