// parallel.h - libtorch's parallel_for, whose tasks may throw: the exception stays ours (boundary.h), and its words.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <exception>
#include <mutex>

namespace relpos {

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr thrown;
  std::mutex one_at_a_time;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) noexcept {
    try {
      f(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(one_at_a_time);
      thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace relpos
