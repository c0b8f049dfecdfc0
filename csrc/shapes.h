// shapes.h - the sizes of one problem, the same letters in every file, on the host and on the device.
//
//   query m = (t, h, w) on the axes' query sizes, key n = (t, i, j) on their key sizes, both row-major.
//   The table holds the rows of all axes, one axis after another; `index` says which row a pair of
//   coordinates uses:
//
//     index[axis.index + c * axis.keys + i]     row of the table for query coordinate c, key coordinate i
//     index[axis.inverse + c * axis.rows + l]   key coordinate that uses row axis.first_row + l, or -1
//
//   An axis without a table has rows == 0 and one coordinate on each side. Kernels know query coordinate c of an axis
//   by its origin, axis.origin + c * axis.origin_step. Where the keys' grid is as fine as that of the queries, or a
//   multiple, or coarser by a power of two, table rows are a progression, and nothing need be looked up:
//
//     row of key i       origin - (i << axis.k_shift)
//
//   Elsewhere k_shift is negative, and it is where the key that uses row l is found: index[origin + l].
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define RELPOS_HD __host__ __device__
#else
#define RELPOS_HD
#endif

namespace relpos {

enum AxisName : int { kT = 0, kH = 1, kW = 2, kAxes = 3 };

template <typename I>
RELPOS_HD constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

template <typename I>
RELPOS_HD constexpr I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}

struct Axis {
  int queries = 1, keys = 1;                      // grid sizes
  int rows = 0;                                   // table rows of this axis: 2 * max(queries, keys) - 1, or 0
  int first_row = 0;                              // where they start in the table
  int64_t index = 0, inverse = 0;                 // where its two lookups start in `index`
  int factor = 0;                                 // where its keys start in a row of factors [t | h | w]
  int k_shift = -1, origin = 0, origin_step = 0;  // see above

  RELPOS_HD int factors() const { return rows ? keys : 0; }
};

struct Shape {
  int64_t groups = 0;  // batch * heads
  int heads = 1;       // group g is head g % heads of batch element g / heads
  int D = 0;           // head dimension
  int prefix = 0;      // class tokens in front of both grids: they get no bias
  Axis axis[kAxes];

  RELPOS_HD int64_t grid_queries() const {
    return static_cast<int64_t>(axis[kT].queries) * axis[kH].queries * axis[kW].queries;
  }
  RELPOS_HD int outer_keys() const { return axis[kT].keys * axis[kH].keys; }  // image rows of keys
  RELPOS_HD int64_t grid_keys() const { return static_cast<int64_t>(outer_keys()) * axis[kW].keys; }
  RELPOS_HD int64_t M() const { return prefix + grid_queries(); }
  RELPOS_HD int64_t N() const { return prefix + grid_keys(); }
  RELPOS_HD int64_t rows() const { return groups * M(); }  // rows of the logits
  RELPOS_HD int table_rows() const { return axis[kT].rows + axis[kH].rows + axis[kW].rows; }
  RELPOS_HD int factors() const { return axis[kT].factors() + axis[kH].factors() + axis[kW].factors(); }
};

// All that it needs is known but this.
inline void set_origin(Axis& axis) {
  const int q = axis.queries, k = axis.keys, ratio = q / k;
  if (k % q == 0) {
    axis.k_shift = 0;
    axis.origin_step = k / q;
  } else if (q % k == 0 && (ratio & (ratio - 1)) == 0) {
    for (axis.k_shift = 0; 1 << axis.k_shift < ratio;) ++axis.k_shift;
    axis.origin_step = 1;
  }
  if (axis.k_shift >= 0) {
    axis.origin = axis.first_row + ((k - 1) << axis.k_shift);
  } else {
    axis.origin = static_cast<int>(axis.inverse) - axis.first_row;
    axis.origin_step = axis.rows;
  }
}

// Fills in everything that follows from the grid sizes; `axes` is 2 (h, w) or 3 (t, h, w).
inline void set_grid(Shape& s, const int64_t* q_size, const int64_t* k_size, int axes) {
  int first_row = 0, factor = 0;
  int64_t offset = 0;
  for (int a = kAxes - axes; a < kAxes; ++a) {
    Axis& axis = s.axis[a];
    axis.queries = static_cast<int>(q_size[a - (kAxes - axes)]);
    axis.keys = static_cast<int>(k_size[a - (kAxes - axes)]);
    axis.rows = 2 * (axis.queries > axis.keys ? axis.queries : axis.keys) - 1;
    axis.first_row = first_row;
    axis.index = offset;
    axis.factor = factor;
    first_row += axis.rows;
    offset += static_cast<int64_t>(axis.queries) * axis.keys;
    factor += axis.keys;
  }
  for (int a = kAxes - axes; a < kAxes; ++a) {
    s.axis[a].inverse = offset;
    set_origin(s.axis[a]);
    offset += static_cast<int64_t>(s.axis[a].queries) * s.axis[a].rows;
  }
}

// Length of the `index` tensor.
inline int64_t index_length(const Shape& s) {
  int64_t length = 0;
  for (const Axis& a : s.axis)
    if (a.rows) length += static_cast<int64_t>(a.queries) * (a.keys + a.rows);
  return length;
}

}  // namespace relpos
