// token_maps.h - keys and queries as TMA sees them: boxes of one group, in rows of 64 elements of D.
#pragma once
#include "../params.h"
#include "tensor_map.h"

namespace relpos {

// Whether TMA can step from one row to the next: an expanded axis has no stride.
inline bool has_strides(const InRows& rows, const Shape& s, int64_t tokens) {
  return (rows.batch || s.groups == s.heads) && (rows.head || s.heads == 1) && (rows.row || tokens == 1);
}

// Bytes from one element of an axis to the next; of an axis of one element, whatever is allowed.
inline int64_t step_of(int64_t size, int64_t bytes) { return size == 1 ? 16 : bytes; }

// Keys or values, without class tokens; a box is some columns of some lines.
inline TensorMap map_of_keys(const AttentionParams& p, const InRows& rows) {
  constexpr int64_t kHalf = 2;
  const Shape& s = p.shape;
  const int64_t columns = s.axis[kW].keys, batch = s.groups / s.heads;
  return make_tensor_map(
      {rows.data,
       int{kHalf},
       5,
       {s.D, columns, s.outer_keys(), s.heads, batch},
       {kHalf, step_of(columns, rows.row * kHalf), step_of(s.outer_keys(), rows.row * columns * kHalf),
        step_of(s.heads, rows.head * kHalf), step_of(batch, rows.batch * kHalf)},
       {kSm90Row, p.keys.columns, p.keys.lines, 1, 1},
       Swizzle::k128});
}

// q or its like; a box is the queries of a tile.
inline TensorMap map_of_queries(const AttentionParams& p, const InRows& rows) {
  constexpr int64_t kHalf = 2;
  const Shape& s = p.shape;
  const int64_t batch = s.groups / s.heads;
  return make_tensor_map({rows.data,
                          int{kHalf},
                          4,
                          {s.D, s.M(), s.heads, batch},
                          {kHalf, step_of(s.M(), rows.row * kHalf), step_of(s.heads, rows.head * kHalf),
                           step_of(batch, rows.batch * kHalf)},
                          {kSm90Row, query_tile(int{kHalf}), 1, 1},
                          Swizzle::k128});
}

}  // namespace relpos
