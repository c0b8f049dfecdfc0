// tiles.h - how the CPU walks through a problem: work memory, table rows as matrices, tiles of queries.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../checks.h"
#include "logits_kernels.h"

namespace relpos {

// ---- memory: zeroed, aligned to the widest vector
template <typename C>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<C*>(std::aligned_alloc(kPadBytes, round_up<int64_t>(n * sizeof(C) + kPadBytes, kPadBytes)))) {
    RELPOS_CHECK(data_ != nullptr, "out of memory for a CPU work buffer of ", n, " elements");
    std::memset(data_.get(), 0, n * sizeof(C) + kPadBytes);
  }
  C* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(C* p) const { std::free(p); }
  };
  std::unique_ptr<C, Free> data_;
};

// ---- the rows of one axis that one query coordinate uses, R[c] = [keys, D]
//
// Stored back to front, so that the row of key i is start(c) + i * step: 1 where the grids agree, more where queries
// are finer. A product can read its rows with a step, not its columns; where it cannot, each coordinate has a block of
// its own, gathered. E: what columns are multiplied as.
template <typename E>
struct AxisRows {
  using C = Sum<E>;
  const Axis* axis = nullptr;
  const int32_t* index = nullptr;
  int64_t step = 0;  // 0: rows follow no such rule
  bool gathered = false;
  int64_t d_padded = 0, column_ld = 0;
  Buffer<C> rows{0};     // [.., D padded]
  Buffer<E> columns{0};  // [D, ..]

  int64_t last_row() const { return axis->first_row + axis->rows - 1; }
  int64_t start(int64_t c) const { return last_row() - index[c * axis->keys]; }
  const C* by_row(int64_t c) const { return rows.get() + (gathered ? c * axis->keys : start(c)) * d_padded; }
  int64_t row_ld() const { return gathered ? d_padded : step * d_padded; }
  const E* by_column(int64_t c, int64_t D) const {
    return columns.get() + (gathered ? c * elements<E>(D) * column_ld : start(c));
  }
};

// An index that the caller of an op made up must not be read through.
inline void check_rows(const Axis& axis, const int32_t* index) {
  int32_t least = axis.first_row, most = axis.first_row;
  for (int64_t i = 0; i < int64_t{axis.queries} * axis.keys; ++i)
    least = std::min(least, index[i]), most = std::max(most, index[i]);
  RELPOS_CHECK(least >= axis.first_row && most < axis.first_row + axis.rows, "index must name rows ", axis.first_row,
               " to ", axis.first_row + axis.rows - 1, " of the table for an axis, got ", least, " to ", most);
}

inline int64_t step_of(const Axis& axis, const int32_t* index) {
  const int64_t step = axis.keys > 1 ? index[0] - index[1] : 1;
  for (int64_t c = 0; c < axis.queries; ++c, index += axis.keys)
    for (int64_t i = 1; i < axis.keys; ++i)
      if (index[i] != index[0] - i * step) return 0;
  return std::max<int64_t>(step, 0);
}

// Number d of a column of elements; of a pair, numbers are bfloat16 already.
template <typename E>
void set_number(E* column, int64_t ld, int64_t d, E x) {
  column[d * ld] = x;
}
inline void set_number(Pair* column, int64_t ld, int64_t d, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  Pair& pair = column[d / 2 * ld];
  (d % 2 ? pair.second : pair.first) = static_cast<uint16_t>(bits >> 16);
}

// table: [rows, D padded] in the compute type. Forward reads columns, backward reads rows.
template <typename E, typename C = Sum<E>>
AxisRows<E> arrange(const Shape& s, const Axis& axis, const int32_t* index, const C* table, bool forward) {
  AxisRows<E> r;
  r.axis = &axis;
  r.index = index + axis.index;
  check_rows(axis, r.index);
  r.step = step_of(axis, r.index);
  r.gathered = forward ? r.step != 1 : r.step == 0;
  r.d_padded = padded<C>(s.D);
  const int64_t blocks = r.gathered ? axis.queries : 1, length = r.gathered ? axis.keys : axis.rows;
  r.column_ld = padded<C>(length + (r.gathered ? 0 : kPadBytes / sizeof(C)));  // a window may end past the last row
  if (forward)
    r.columns = Buffer<E>(blocks * elements<E>(s.D) * r.column_ld);
  else
    r.rows = Buffer<C>(blocks * length * r.d_padded);
  for (int64_t c = 0; c < blocks; ++c)
    for (int64_t i = 0; i < length; ++i) {
      const C* row = table + (r.gathered ? r.index[c * axis.keys + i] : r.last_row() - i) * r.d_padded;
      if (!forward)
        std::memcpy(r.rows.get() + (c * length + i) * r.d_padded, row, r.d_padded * sizeof(C));
      else
        for (int64_t d = 0; d < s.D; ++d)
          set_number(r.columns.get() + c * elements<E>(s.D) * r.column_ld + i, r.column_ld, d, row[d]);
    }
  return r;
}

// ---- tiles
struct Tile {
  int64_t group, line, lines, column, columns;
  int64_t queries() const { return lines * columns; }
};

class Tiling {
 public:
  explicit Tiling(const Shape& s)
      : groups_(s.groups), lines_(s.axis[kT].queries * s.axis[kH].queries), columns_(s.axis[kW].queries) {
    tile_columns_ = std::min<int64_t>(columns_, 128);
    tile_lines_ = std::max<int64_t>(1, std::min(lines_, kTileQueries / tile_columns_));
    line_tiles_ = ceil_div(lines_, tile_lines_);
    column_tiles_ = ceil_div(columns_, tile_columns_);
  }
  int64_t count() const { return groups_ * line_tiles_ * column_tiles_; }
  int64_t max_queries() const { return tile_lines_ * tile_columns_; }
  Tile operator[](int64_t i) const {
    const int64_t column = i % column_tiles_ * tile_columns_, line = i / column_tiles_ % line_tiles_ * tile_lines_;
    return {i / column_tiles_ / line_tiles_, line, std::min(tile_lines_, lines_ - line), column,
            std::min(tile_columns_, columns_ - column)};
  }

 private:
  static constexpr int64_t kTileQueries = 384;  // 6 lines of 64: factors of a tile stay in a core's L2
  int64_t groups_, lines_, columns_, tile_lines_, tile_columns_, line_tiles_, column_tiles_;
};

// The queries of a tile that share coordinate c of axis a: `count` rows, the first and the step between them.
struct Sharing {
  int64_t coordinate, first, count, step;
};
template <typename F>
void for_each_sharing(const Shape& s, const Tile& t, int a, F&& f) {
  if (a == kW) {
    for (int64_t x = 0; x < t.columns; ++x) f(Sharing{t.column + x, x, t.lines, t.columns});
  } else {
    for (int64_t y = 0; y < t.lines; ++y) {
      const int64_t line = t.line + y, h = s.axis[kH].queries;
      f(Sharing{a == kH ? line % h : line / h, y * t.columns, t.columns, 1});
    }
  }
}

}  // namespace relpos
