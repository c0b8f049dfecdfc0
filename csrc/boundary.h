// boundary.h - between libtorch and an op: no exception of ours gets there, libtorch throws its own with our words.
//
// Each side unwinds and catches with the C++ runtime it was linked to. Some compilers link ours statically, into this
// library alone, and two runtimes with one exception between them end the process.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

namespace relpos {

// What OP throws, in words; null if it does not. Never inlined: the caller may have nothing to unwind.
template <auto OP>
C10_NOINLINE const char* refusal_of(StableIValue* stack, uint64_t inputs, uint64_t outputs) noexcept {
  static thread_local std::string words;
  try {
    TORCH_BOX(OP)(stack, inputs, outputs);
    return nullptr;
  } catch (const std::exception& e) {
    words = e.what();
    return words.c_str();
  }
}

// OP as libtorch calls it: m.impl("name", boxed<&op>).
template <auto OP>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  if (const char* words = refusal_of<OP>(stack, inputs, outputs))
    aoti_torch_check(false, __func__, __FILE__, __LINE__, words);
}

}  // namespace relpos
