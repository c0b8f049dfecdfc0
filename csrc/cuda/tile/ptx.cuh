// ptx.cuh - one function per instruction; the only file with asm.
#pragma once
#include "../runtime.h"
#include "../swizzle.h"
#include "../tensor_map.h"

#ifndef RELPOS_EMULATE
namespace relpos {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- every architecture

// Four 8x8 matrices of 16-bit elements from shared memory: lane 8j + r gives row r of matrix j; lane l receives
// elements 2 * (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row)));
}

// d[16 x 8] += a[16 x 16] * b[16 x 8], float32 accumulation.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x to 2^-22 of the result; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x; the compiler cannot know that it is the same again. What is computed from it is then computed where it is used,
// and takes no register in the loops between.
__device__ __forceinline__ int64_t afresh(int64_t x) {
  asm volatile("mov.b64 %0, %0;" : "+l"(x));
  return x;
}

// 16 bytes that are read once: they leave L1 to the table and the index.
__device__ __forceinline__ uint4 load_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// The 128 bytes around *p are on their way to L2; nobody waits for them.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}

// 16 bytes to shared memory that have arrived after a wait; zeros where `pred` is false.
__device__ __forceinline__ void cp_async_16(void* dst, const void* src, bool pred) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(pred ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Barrier `id`, 1 to 15, of `threads` threads in whole warps: those who only arrive do not wait.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- sm_90: matrices to shared memory, lane 8j + r gives the address of row r of matrix j

__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- sm_90: barriers in shared memory. A phase ends when `count` have arrived and all expected bytes, too.

__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
// Before TMA may use what this thread has initialised.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives, and has the phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_expect_bytes(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; of a new barrier that of parity 1 has.
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// What this thread has written to shared memory will be seen by TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box of `map` whose first element is `at`, innermost axis first, to dst; its bytes arrive at the barrier.
template <int RANK>
__device__ __forceinline__ void tma_load(void* dst, const TensorMap& map, uint64_t* bar, const int (&at)[RANK]) {
  static_assert(1 <= RANK && RANK <= 5);
#define RELPOS_TMA_LOAD(rank, names, ...)                                                 \
  if constexpr (RANK == rank)                                                             \
  asm volatile("cp.async.bulk.tensor." #rank                                              \
               "d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" names \
               "}], [%2];" ::"r"(shared_address(dst)),                                    \
               "l"(&map), "r"(shared_address(bar)), __VA_ARGS__                           \
               : "memory")
  RELPOS_TMA_LOAD(1, "%3", "r"(at[0]));
  RELPOS_TMA_LOAD(2, "%3, %4", "r"(at[0]), "r"(at[1]));
  RELPOS_TMA_LOAD(3, "%3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]));
  RELPOS_TMA_LOAD(4, "%3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
  RELPOS_TMA_LOAD(5, "%3, %4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]));
#undef RELPOS_TMA_LOAD
}

// ---- sm_90: products of a warpgroup. In order: wgmma_fence, wgmma_ss or _rs, wgmma_commit, wgmma_wait; until then
// nobody may touch d, nor what is multiplied. The accumulators given to fence and wait are those the compiler must not
// move across.

template <int R>
__device__ __forceinline__ void pin(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// For operands in registers: made before what follows.
template <int R>
__device__ __forceinline__ void pin(uint32_t (&a)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+r"(a[i])::"memory");
}
template <int... R>
__device__ __forceinline__ void wgmma_fence(float (&... d)[R]) {
  (pin(d), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the committed groups are under way.
template <int N, int... R>
__device__ __forceinline__ void wgmma_wait(float (&... d)[R]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  (pin(d), ...);
}

__device__ __forceinline__ uint64_t wgmma_descriptor(const void* p, int leading_bytes, int stride_bytes, Swizzle s) {
  return encode_descriptor(shared_address(p), leading_bytes, stride_bytes, s);
}

// One line per N: N, the registers of d, the numbers of the operands that follow them in the asm.
#define RELPOS_WGMMA_SHAPES(SHAPE)       \
  SHAPE(32, 16, 17, 18, 19, 20, 21, 22)  \
  SHAPE(48, 24, 25, 26, 27, 28, 29, 30)  \
  SHAPE(64, 32, 33, 34, 35, 36, 37, 38)  \
  SHAPE(80, 40, 41, 42, 43, 44, 45, 46)  \
  SHAPE(96, 48, 49, 50, 51, 52, 53, 54)  \
  SHAPE(112, 56, 57, 58, 59, 60, 61, 62) \
  SHAPE(128, 64, 65, 66, 67, 68, 69, 70)

#define RELPOS_D8(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define RELPOS_D16 RELPOS_D8(0), RELPOS_D8(8)
#define RELPOS_D24 RELPOS_D16, RELPOS_D8(16)
#define RELPOS_D32 RELPOS_D24, RELPOS_D8(24)
#define RELPOS_D40 RELPOS_D32, RELPOS_D8(32)
#define RELPOS_D48 RELPOS_D40, RELPOS_D8(40)
#define RELPOS_D56 RELPOS_D48, RELPOS_D8(48)
#define RELPOS_D64 RELPOS_D56, RELPOS_D8(56)
#define RELPOS_NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define RELPOS_NAMES24 RELPOS_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define RELPOS_NAMES32 RELPOS_NAMES24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define RELPOS_NAMES40 RELPOS_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define RELPOS_NAMES48 RELPOS_NAMES40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define RELPOS_NAMES56 RELPOS_NAMES48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define RELPOS_NAMES64 RELPOS_NAMES56 ", %56, %57, %58, %59, %60, %61, %62, %63"

#define RELPOS_WGMMA_ASM(n, regs, type, use_d, operands, ...)                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #use_d ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32." type "." type " {" RELPOS_NAMES##regs "}, " operands ";\n}"                   \
               : RELPOS_D##regs                                                                         \
               : __VA_ARGS__);
#define RELPOS_WGMMA(n, regs, ...)                                                                 \
  if constexpr (N == n && std::is_same_v<T, __half>) RELPOS_WGMMA_ASM(n, regs, "f16", __VA_ARGS__) \
  if constexpr (N == n && std::is_same_v<T, __nv_bfloat16>) RELPOS_WGMMA_ASM(n, regs, "bf16", __VA_ARGS__)
#define RELPOS_IS_N(n, ...) N == n ||

// d[64 x N] = a[64 x 16] * b[16 x N], + d if `accumulate`. Thread t of the warpgroup holds in d[4 j + 2 h + e] row
// t / 32 * 16 + t % 32 / 4 + 8 h, column 8 j + t % 4 * 2 + e; of a its warp's 16 rows as for mma_m16n8k16. A matrix in
// shared memory is K-major; b may be MN-major.
template <typename T, int N, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(RELPOS_WGMMA_SHAPES(RELPOS_IS_N) false, "no line of RELPOS_WGMMA_SHAPES has this N");
#define RELPOS_WGMMA_SS(n, r0, r1, r2, r3, ...)                                                          \
  RELPOS_WGMMA(n, r0, r2, "%" #r0 ", %" #r1 ", p, 1, 1, 0, %" #r3, "l"(a), "l"(b), "r"(int{accumulate}), \
               "n"(int{B_MN_MAJOR}))
  RELPOS_WGMMA_SHAPES(RELPOS_WGMMA_SS)
}
template <typename T, int N, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(RELPOS_WGMMA_SHAPES(RELPOS_IS_N) false, "no line of RELPOS_WGMMA_SHAPES has this N");
#define RELPOS_WGMMA_RS(n, r0, r1, r2, r3, r4, r5, r6)                                                                \
  RELPOS_WGMMA(n, r0, r5, "{%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 "}, %" #r4 ", p, 1, 1, %" #r6, "r"(a[0]), "r"(a[1]), \
               "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}), "n"(int{B_MN_MAJOR}))
  RELPOS_WGMMA_SHAPES(RELPOS_WGMMA_RS)
}

// Registers of a thread, taken from or given back to the block's; by a whole warpgroup.
template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_inc() {
  static_assert(REGISTERS % 8 == 0 && 24 <= REGISTERS && REGISTERS <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_dec() {
  static_assert(REGISTERS % 8 == 0 && 24 <= REGISTERS && REGISTERS <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace relpos
#endif
