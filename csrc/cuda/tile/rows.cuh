// rows.cuh - which queries a tile of consecutive rows of the logits holds, and which table rows they use.
#pragma once
#include "../../params.h"
#include "../runtime.h"

namespace relpos {

// Every thread below `count` locates one row.
__device__ __forceinline__ void locate_rows(const Shape& s, const InRows& q, int64_t first_row, int count,
                                            RowOfTile* rows) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t row = first_row + i, group = row / s.M();
    const int m = static_cast<int>(row - group * s.M()), token = m - s.prefix;
    RowOfTile r;
    const int line = token / s.axis[kW].queries;
    r.coordinate[kT] = token < 0 ? -1 : line / s.axis[kH].queries;
    r.coordinate[kH] = token < 0 ? -1 : line % s.axis[kH].queries;
    r.coordinate[kW] = token < 0 ? -1 : token % s.axis[kW].queries;
    r.padding = 0;
    r.q_offset = group / s.heads * q.batch + group % s.heads * q.head + m * q.row;
    rows[i] = r;
  }
}

// ranges[2a], ranges[2a + 1]: lowest and highest table row that the tile's queries use on axis a. One warp per axis;
// table rows grow with the query coordinate and fall with the key.
__device__ __forceinline__ void find_ranges(const Shape& s, const int32_t* index, const RowOfTile* rows, int count,
                                            int* ranges) {
  const int a = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (a >= kAxes || s.axis[a].rows == 0) return;
  int low = s.axis[a].queries, high = -1;
  for (int i = lane; i < count; i += 32) {
    const int c = rows[i].coordinate[a];
    if (c < 0) continue;
    low = min(low, c);
    high = max(high, c);
  }
  for (int x = 16; x; x /= 2) {
    low = min(low, __shfl_xor_sync(~0u, low, x));
    high = max(high, __shfl_xor_sync(~0u, high, x));
  }
  if (lane != 0) return;
  const int keys = s.axis[a].keys;
  const int32_t* of_axis = index + s.axis[a].index;
  ranges[2 * a] = high < 0 ? 0 : of_axis[low * keys + keys - 1];
  ranges[2 * a + 1] = high < 0 ? -1 : of_axis[high * keys];
}

}  // namespace relpos
