// selftest_sm90.cpp - the kernels of selftest_sm90.cuh on the emulator.
#include "selftest_sm90.cuh"

// The shim's complaint, or null.
extern "C" __attribute__((visibility("default"))) const char* run_sm90(const char* name, const selftest::Given* given) {
  static const selftest::Kernels kernels = selftest::all_kernels<WGMMA_N>();
  static std::string complaint;
  try {
    simt::reset_stats();
    const selftest::Config& c = kernels.at(name);
    selftest::Params p{*given, {}, {}};
    const int shared = prepare(p, c);
    simt::launch(c.kernel, 1, static_cast<unsigned>(c.threads), static_cast<size_t>(shared), p);
  } catch (const std::exception& e) {
    complaint = e.what();
    return complaint.c_str();
  }
  return nullptr;
}
