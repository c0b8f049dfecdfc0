// swizzle.h - how TMA permutes a tile in shared memory, and how wgmma is told where a matrix lies.
//
//   span      a swizzled row is as long as the span; its chunks of 16 bytes are exclusive-ored with the row's number,
//   repeat    which is bits 7 to 9 of the address, so that the pattern repeats after 8 spans:
//
//     k32   bit  4    ^= bit  7          k64   bits 4-5 ^= bits 7-8          k128  bits 4-6 ^= bits 7-9
#pragma once
#include <cstdint>

#include "../shapes.h"

namespace relpos {

enum class Swizzle { kNone, k128, k64, k32 };  // as bits 62 and 63 of a descriptor have it

RELPOS_HD constexpr int span_of(Swizzle s) { return s == Swizzle::kNone ? 16 : 256 >> static_cast<int>(s); }
RELPOS_HD constexpr int repeat_of(Swizzle s) { return 8 * span_of(s); }

// The matrix descriptor of wgmma: bits 0-13 the address, 16-29 and 32-45 the two strides, all in units of 16 bytes.
// Rows of 8 are cores; a row is a span, and contiguous along K, or along MN for a matrix that is MN-major.
//
//              leading_bytes                                       stride_bytes
//   K-major    from k to k + 8; not used by a swizzle              from row mn to mn + 8
//   MN-major   from one span of mn to the next (kNone: k to k + 8)  from k to k + 8 (kNone: mn to mn + 8)
RELPOS_HD constexpr uint64_t encode_descriptor(uint32_t address, int leading_bytes, int stride_bytes, Swizzle swizzle) {
  const auto field = [](uint64_t bytes, int bit) { return (bytes >> 4 & 0x3fff) << bit; };
  return field(address, 0) | field(static_cast<uint64_t>(leading_bytes), 16) |
         field(static_cast<uint64_t>(stride_bytes), 32) | static_cast<uint64_t>(swizzle) << 62;
}

}  // namespace relpos
