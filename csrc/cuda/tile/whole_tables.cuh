// whole_tables.cuh - the factors of a strip where an axis has up to 32 table rows, all of them in shared memory.
//
// The strip is multiplied with the rows of an axis, all at once, and the products are put down as they are. Nothing is
// sorted by keys: a query knows where its key 0 is, and keys go back from there, a step of 1 << k_shift rows each.
//
//                 rows l of the axis, 0 .. 31
//                +----------------------------+
//   query m      | .  .  k3 k2 k1 k0 .  .  .  |      k0, k1, ...: the factors of keys 0, 1, ...
//   query m + 1  | .  .  .  k3 k2 k1 k0 .  .  |      . : products that no key of this query uses
//                +----------------------------+
#pragma once
#include "factor_gradients.cuh"

namespace relpos {

// By all threads.
template <typename T, int D>
__device__ __forceinline__ void copy_table(const Tile<T, D>& to, int rows, const AttentionParams& p) {
  const T* table = static_cast<const T*>(p.table);
  copy_rows(to, rows, p.shape.D, threadIdx.x, blockDim.x, table,
            [&](int row) { return row < p.shape.table_rows() ? table + row * p.shape.D : nullptr; });
}

// Products of a warp's strip with the table rows of an axis, times `factor`, into its stage.
template <typename Rows, typename A>
__device__ __forceinline__ void put_products(const AttentionParams& p, int a, A&& queries, const Rows& table,
                                             float factor, float* stage) {
  const int lane = threadIdx.x % 32;
  float products[1][kWholeTable / 8][4] = {};
  add_products(products, queries, table, p.shape.axis[a].first_row, p.shape.D);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < kWholeTable / 8; ++j)
      set_pair(stage + (lane / 4 + half * 8) * kWholeTableLd + j * 8 + lane % 4 * 2, products[0][j][2 * half] * factor,
               products[0][j][2 * half + 1] * factor);
  __syncwarp();
}

// The row of the axis that query `row` of the strip uses for key 0; for key i, i << k_shift before it.
__device__ __forceinline__ int row_of_first_key(const AttentionParams& p, int a, const Coordinates* rows, int row) {
  const Axis& axis = p.shape.axis[a];
  const int c = max(rows[row].of[a], 0);  // what does not exist uses something
  return axis.origin + c * axis.origin_step - axis.first_row;
}
// Where in the stage the factor of key 0 is for a query.
__device__ __forceinline__ int place_of_first_key(const AttentionParams& p, int a, const Coordinates* rows, int row) {
  return row * kWholeTableLd + row_of_first_key(p, a, rows, row);
}

// dq += d_a / scale times the table rows of axis a; d_a of query m of the strip and key i is gradients[m * ld + i].
template <typename T, int D>
__device__ __forceinline__ void add_whole_table(const AttentionParams& p, int a, const Coordinates* rows,
                                                const Tile<T, D>& table, const float* gradients, int ld,
                                                float (&dq)[1][D / 8][4]) {
  const Axis& axis = p.shape.axis[a];
  const int row = threadIdx.x % 32u / 4u, column = threadIdx.x % 4u * 2u;
  const int first[2] = {row_of_first_key(p, a, rows, row), row_of_first_key(p, a, rows, row + 8)};
  gradients += row * ld;
#pragma unroll
  for (int step = 0; step < kWholeTable / 16; ++step) {
    float x[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i % 4 / 2;
      const auto down = static_cast<unsigned>(first[half] - column - (step * 16 + i / 4 * 8 + i % 2));
      const int key = static_cast<int>(__funnelshift_r(down, down, axis.k_shift));  // as find_keys does
      x[i / 4][i % 4] = is_between(key, 0, axis.keys) ? gradients[half * 8 * ld + key] * p.inverse_scale : 0.f;
    }
    add_rows(dq, x, table, axis.first_row + step * 16, p.shape.D);
  }
}

}  // namespace relpos
