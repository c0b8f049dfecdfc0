// pages.h - results whose memory the system has yet to hand out: in huge pages, where it has them and may.
//
// The first write to each page of 4 KiB costs more than what our loops write into it. Pages of 2 MiB cost a quarter,
// all in all. Linux gives them to those who ask, in its usual setting (madvise); numpy asks for all arrays from this
// size on, and so does PyTorch where THP_MEM_ALLOC_ENABLE=1.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace relpos {

constexpr int64_t kHugeResult = 4 << 20;  // bytes, from which it is worth a system call

inline bool may_ask_for_huge_pages() {
  static const bool may = [] {
    const char* set = std::getenv("RELPOS_CUDA_HUGE_PAGES");  // checked when the library is loaded
    return !set || std::strcmp(set, "0") != 0;
  }();
  return may;
}

// Of a tensor that is about to be written from end to end. It is a wish: whatever comes of it, the results are the
// same.
inline void ask_for_huge_pages(const torch::stable::Tensor& t) {
#ifdef MADV_HUGEPAGE
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (bytes < kHugeResult || !may_ask_for_huge_pages()) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));  // what we share with others stays as it is
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t begin = (data + page - 1) / page * page, end = (data + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace relpos
