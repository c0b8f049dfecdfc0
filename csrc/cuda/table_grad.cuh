// table_grad.cuh - gradient of the table from the gradient of the factors, without atomics, in a fixed order.
//
//   dR_a[c, i] = sum over queries m with coordinate c on axis a of d_rel_a[m, i] * q[m]        partial_kernel
//   dtable[l]  = sum over c of dR_a[c, i] where index[c, i] = l                                sum_kernel
//
//   partial_kernel
//     grid     (query coordinates of all axes, splits): a block sums a fixed share of the queries of its coordinate.
//     thread   (x, y) of 16 x 16: keys y, y + 16, .. and elements x, x + 16, .. of a 64 x 128 tile of dR.
//     shared   factors [kRows, 64] and q [kRows, 128] float.
//     barriers two per kRows queries: they are there; they may be overwritten.
//   sum_kernel
//     grid     (table rows); thread: elements of D; no shared memory, no barrier.
#pragma once
#include "tile/copy.cuh"
#include "tile/rows.cuh"

namespace relpos {

constexpr int kGradKeys = 64, kGradD = 128, kGradRows = 16, kGradSide = 16;

// Row of the logits (and of the factors) of the u-th query whose coordinate on axis a is c.
__device__ __forceinline__ int64_t row_of_query(const Shape& s, int a, int c, int64_t u, int64_t per_group) {
  int64_t inner = 1;
  for (int later = a + 1; later < kAxes; ++later) inner *= s.axis[later].queries;
  const int64_t group = u / per_group, rest = u - group * per_group;
  const int64_t token = rest / inner * inner * s.axis[a].queries + c * inner + rest % inner;
  return group * s.M() + s.prefix + token;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) table_partial_kernel(const TableGradParams p) {
  RELPOS_DYNAMIC_SHARED(shared);
  float* factors_smem = reinterpret_cast<float*>(shared);       // [kGradRows][kGradKeys]
  float* q_smem = factors_smem + kGradRows * kGradKeys;         // [kGradRows][kGradD]
  const Shape& s = p.shape;
  const T* q = static_cast<const T*>(p.q.data);
  int a = 0, c = blockIdx.x;
  while (s.axis[a].rows == 0 || c >= s.axis[a].queries) c -= s.axis[a].rows == 0 ? 0 : s.axis[a].queries, ++a;
  const Axis& axis = s.axis[a];
  const int x = threadIdx.x % kGradSide, y = threadIdx.x / kGradSide, width = s.factors();
  const int64_t per_group = s.grid_queries() / axis.queries, queries = s.groups * per_group;
  const int64_t begin = queries * blockIdx.y / p.splits, end = queries * (blockIdx.y + 1) / p.splits;

  for (int i0 = 0; i0 < axis.keys; i0 += kGradKeys)
    for (int d0 = 0; d0 < s.D; d0 += kGradD) {
      float acc[kGradKeys / kGradSide][kGradD / kGradSide] = {};
      for (int64_t u0 = begin; u0 < end; u0 += kGradRows) {
        // Thread row y stages query u0 + y.
        const bool exists = u0 + y < end;
        const int64_t row = exists ? row_of_query(s, a, c, u0 + y, per_group) : 0;
        const int64_t group = row / s.M(), m = row - group * s.M();
        const T* q_row = q + group / s.heads * p.q.batch + group % s.heads * p.q.head + m * p.q.row;
        const float* factors_row = p.dfactors + row * width + axis.factor;
        for (int i = x; i < kGradKeys; i += kGradSide)
          factors_smem[y * kGradKeys + i] = exists && i0 + i < axis.keys ? factors_row[i0 + i] : 0.f;
        for (int d = x; d < kGradD; d += kGradSide)
          q_smem[y * kGradD + d] = exists && d0 + d < s.D ? to_float(q_row[d0 + d]) : 0.f;
        __syncthreads();
        for (int r = 0; r < kGradRows; ++r) {
#pragma unroll
          for (int i = 0; i < kGradKeys / kGradSide; ++i) {
            const float f = factors_smem[r * kGradKeys + i * kGradSide + y];
#pragma unroll
            for (int d = 0; d < kGradD / kGradSide; ++d) acc[i][d] += f * q_smem[r * kGradD + d * kGradSide + x];
          }
        }
        __syncthreads();
      }
      float* of_split = p.partials + (blockIdx.y * p.pairs + axis.index + static_cast<int64_t>(c) * axis.keys) * s.D;
#pragma unroll
      for (int i = 0; i < kGradKeys / kGradSide; ++i)
#pragma unroll
        for (int d = 0; d < kGradD / kGradSide; ++d) {
          const int key = i0 + i * kGradSide + y, element = d0 + d * kGradSide + x;
          if (key < axis.keys && element < s.D) of_split[static_cast<int64_t>(key) * s.D + element] = acc[i][d];
        }
    }
}

__global__ void __launch_bounds__(kThreads, 2) table_sum_kernel(const TableGradParams p) {
  const Shape& s = p.shape;
  int a = 0;
  while (static_cast<int>(blockIdx.x) >= s.axis[a].first_row + s.axis[a].rows) ++a;
  const Axis& axis = s.axis[a];
  const int32_t* key_of = p.index + axis.inverse + (blockIdx.x - axis.first_row);
  for (int d = threadIdx.x; d < s.D; d += blockDim.x) {
    float sum = 0.f, lost = 0.f;  // compensated: partial sums of many queries meet here one by one
    for (int c = 0; c < axis.queries; ++c) {
      const int key = key_of[static_cast<int64_t>(c) * axis.rows];
      if (key < 0) continue;
      const int64_t pair = axis.index + static_cast<int64_t>(c) * axis.keys + key;
      for (int split = 0; split < p.splits; ++split) {
        const float x = p.partials[(split * p.pairs + pair) * s.D + d] - lost, next = sum + x;
        lost = (next - sum) - x;
        sum = next;
      }
    }
    p.dtable[static_cast<int64_t>(blockIdx.x) * s.D + d] = sum;
  }
}

}  // namespace relpos
