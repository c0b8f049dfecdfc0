// probe_sm90.cu - the kernels of tests/simt/selftest_sm90.cuh on a GPU, with the interface of selftest_sm90.cpp.
#include "../tests/simt/selftest_sm90.cuh"

namespace {

// Bytes on the device for as long as they are needed.
class Copy {
 public:
  Copy(const void* host, int64_t bytes) {
    if (bytes == 0) return;
    RELPOS_CUDA_CHECK(cudaMalloc(&at, static_cast<size_t>(bytes)));
    RELPOS_CUDA_CHECK(cudaMemcpy(at, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
  }
  ~Copy() { cudaFree(at); }
  void* at = nullptr;
};

void launch(const selftest::Config& c, const selftest::Given& given) {
  int device = 0, major = 0;
  RELPOS_CUDA_CHECK(cudaGetDevice(&device));
  RELPOS_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  RELPOS_CHECK(major == 9, "this GPU has no instructions of sm_90a");
  const Copy a(given.a, given.a_bytes), b(given.b, given.b_bytes), out(given.out, given.out_bytes);
  selftest::Params p{};
  static_cast<selftest::Given&>(p) = given;
  p.a = a.at, p.b = b.at, p.out = out.at;
  const int shared = prepare(p, c);
  void* arguments[] = {&p};
  RELPOS_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(c.kernel), dim3(1), dim3(c.threads), arguments,
                                     static_cast<size_t>(shared), nullptr));
  RELPOS_CUDA_CHECK(cudaMemcpy(given.out, out.at, static_cast<size_t>(given.out_bytes), cudaMemcpyDeviceToHost));
}

}  // namespace

// The complaint, or null.
extern "C" __attribute__((visibility("default"))) const char* run_sm90(const char* name, const selftest::Given* given) {
  static const selftest::Kernels kernels = selftest::all_kernels<WGMMA_N>();
  static std::string complaint;
  try {
    launch(kernels.at(name), *given);
  } catch (const std::exception& e) {
    complaint = e.what();
    return complaint.c_str();
  }
  return nullptr;
}
