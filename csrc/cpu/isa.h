// isa.h - which instruction set this process uses: the best it has, or less by RELPOS_CUDA_CPU_ISA. Chosen once.
#pragma once
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <string>
#ifdef RELPOS_HAVE_X86_ISAS
#include <cpuid.h>
#endif

namespace relpos {

#ifdef RELPOS_HAVE_X86_ISAS
// Features that __builtin_cpu_supports has no name for in older compilers.
inline bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx >> 29 & 1;
}
inline bool has_avx512bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 5 & 1;
}
#endif

inline const char* instruction_set() {
  static const std::string chosen = [] {
#ifdef RELPOS_HAVE_X86_ISAS
    const char* cap = std::getenv("RELPOS_CUDA_CPU_ISA");  // checked when the library is loaded
    std::string most = cap && *cap ? cap : "avx512_bf16";
    for (char& c : most) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    const bool any512 = most == "avx512" || most == "avx512_bf16";
    const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (most == "avx512_bf16" && has512 && has_avx512bf16()) return "avx512_bf16";
    if (any512 && has512) return "avx512";
    if ((any512 || most == "avx2") && has2) return "avx2";
#endif
    return "baseline";
  }();
  return chosen.c_str();
}

// Products of bfloat16: pair_kernels.h.
inline bool has_pairs() { return !std::strcmp(instruction_set(), "avx512_bf16"); }

// The table of this instruction set, of those compiled: `baseline`, and on x86 the others.
#ifdef RELPOS_HAVE_X86_ISAS
template <typename Table>
const Table& for_this_processor(const Table& baseline, const Table& avx2, const Table& avx512,
                                const Table& avx512_bf16) {
  if (has_pairs()) return avx512_bf16;
  if (!std::strcmp(instruction_set(), "avx512")) return avx512;
  if (!std::strcmp(instruction_set(), "avx2")) return avx2;
  return baseline;
}
#define RELPOS_CHOOSE(table) for_this_processor(baseline::table, avx2::table, avx512::table, avx512_bf16::table)
#else
#define RELPOS_CHOOSE(table) baseline::table
#endif

}  // namespace relpos
