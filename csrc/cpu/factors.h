// factors.h - the factors of a tile of queries, and what follows from their gradients: small dense products.
//
//   forward    f[m, i]  = <q[m], R[c(m), i]>               for every axis, c(m) the coordinate of query m
//   backward   dq[m]   += sum over axes, keys i of d[m, i] * R[c(m), i]
//              dR[c,i] += sum over queries m with coordinate c of d[m, i] * q[m]
//
// A tile is a few image rows of queries of one group ("lines") and a range of columns. With it, every
// product is a small dense matrix product: queries of one line share R of the h axis, queries of one
// column share R of the w axis. R itself is a window of the table where query and key grids agree, so it
// is not copied out; backward, nor where it is every second or fourth row of one. Table gradients are summed in a fixed
// number of slices, in a fixed order: the result does not depend on the number of threads.
#pragma once
#include <algorithm>
#include <cstring>

#include "../checks.h"
#include "isa.h"
#include "logits_kernels.h"
#include "pair_kernels.h"
#include "parallel.h"
#include "tiles.h"

namespace relpos {

template <typename C>
const LogitsKernels<C>& kernels() {
  if constexpr (sizeof(C) == 8)
    return RELPOS_CHOOSE(kLogitsDouble);
  else
    return RELPOS_CHOOSE(kLogitsFloat);
}

inline const PairKernels* pair_kernels() {
#ifdef RELPOS_HAVE_X86_ISAS
  if (has_pairs()) return &avx512_bf16::kPairs;
#endif
  return nullptr;
}

inline Dtype dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      RELPOS_CHECK(false, name, " must be floating point");
  }
}

// Of the table gradient, and of lse.
inline ScalarType wide_type_of(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(E{}) for the elements that products of tensors like q are made of.
template <typename F>
void with_element(const Tensor& q, F&& f) {
  if (q.scalar_type() == ScalarType::Double) return f(double{});
  if (q.scalar_type() == ScalarType::BFloat16 && pair_kernels()) return f(Pair{});
  f(float{});
}

inline int64_t bytes_of(Dtype t) { return t == Dtype::kFloat64 ? 8 : t == Dtype::kFloat32 ? 4 : 2; }

// ---- queries and tables of one call, everything resolved
//
// Tokens of a packed qkv lie kilobytes apart, and no processor sees the next one coming. Rows are asked for some ahead;
// where groups are small, the row of the next head with them, which memory has at hand: into L2, it is wanted soon.
constexpr int64_t kRowsAhead = 8, kSmallGroup = 640;

template <int WRITE, int LOCALITY>
inline void prefetch(const void* row, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(row) + i, WRITE, LOCALITY);
}
struct Asking {
  int64_t bytes, to_next;  // bytes of a row, and from it to that of the next head; 0: it is not asked for

  void operator()(const void* row) const {
    prefetch<0, 3>(row, bytes);
    if (to_next) prefetch<0, 2>(static_cast<const char*>(row) + to_next, bytes);
  }
};

// E: what queries and the table are multiplied as, C: what sums are in.
template <typename E>
struct Problem {
  using C = Sum<E>;
  static constexpr bool kPairs = kNumbers<E> == 2;

  Shape shape;
  QueryStrides strides;
  const void* q;
  Dtype q_dtype;
  const LogitsKernels<C>& run = kernels<C>();
  const PairKernels* pairs = pair_kernels();
  int64_t d_padded = padded<C>(shape.D);
  int64_t t_ld = padded<C>(shape.axis[kT].factors()), h_ld = padded<C>(shape.axis[kH].keys),
          w_ld = padded<C>(shape.axis[kW].keys);

  const void* q_row(int64_t group, int64_t m) const {
    return static_cast<const char*>(q) + row_offset(shape, strides, group, m) * bytes_of(q_dtype);
  }
  int64_t query(const Tile& t, int64_t i) const {  // token of the i-th query of a tile
    return shape.prefix + (t.line + i / t.columns) * shape.axis[kW].queries + t.column + i % t.columns;
  }
  Asking asking(const QueryStrides& rows, Dtype dtype, int64_t group) const {
    const bool soon = shape.M() <= kSmallGroup && shape.N() <= kSmallGroup && (group + 1) % shape.heads != 0;
    return {shape.D * bytes_of(dtype), soon ? rows.head * bytes_of(dtype) : 0};
  }
  // Calls f(i, row) for rows at(0) .. at(count - 1).
  template <typename At, typename F>
  static void for_each_row(int64_t count, const Asking& ask, At&& at, F&& f) {
    for (int64_t i = 0; i < std::min(kRowsAhead, count); ++i) ask(at(i));
    for (int64_t i = 0; i < count; ++i) {
      if (i + kRowsAhead < count) ask(at(i + kRowsAhead));
      f(i, at(i));
    }
  }
  // Rows of D numbers each, to rows of the compute type.
  template <typename At>
  void load_rows(C* to, int64_t count, Dtype dtype, const Asking& ask, At&& at) const {
    for_each_row(count, ask, at, [&](int64_t i, const void* row) { run.load(to + i * d_padded, row, dtype, shape.D); });
  }
  // The same as operands of products, along D: numbers, or pairs as they are.
  int64_t e_padded() const { return elements<E>(d_padded); }
  template <typename At>
  void load_operands(E* to, int64_t count, Dtype dtype, const Asking& ask, At&& at) const {
    if constexpr (kPairs)
      for_each_row(count, ask, at,
                   [&](int64_t i, const void* row) { std::memcpy(to + i * e_padded(), row, ask.bytes); });
    else
      load_rows(to, count, dtype, ask, at);
  }
  void gemm(const Gemm<E>& g) const {
    if constexpr (kPairs)
      pairs->gemm(g);
    else
      run.gemm(g);
  }
  int64_t factor_ld(int a) const { return a == kT ? t_ld : a == kH ? h_ld : w_ld; }
};

// Working memory of one thread: q, as operands, and the factors of a tile.
template <typename E>
struct Scratch {
  using C = Sum<E>;
  Buffer<E> q;
  Buffer<C> t, h, w, outer;  // outer: of one query
  Scratch(const Problem<E>& p, int64_t queries)
      : q(queries * p.e_padded()),
        t(queries * p.t_ld),
        h(queries * p.h_ld),
        w(queries * p.w_ld),
        outer(padded<C>(p.shape.outer_keys())) {}
  C* factors(int a) const { return (a == kT ? t : a == kH ? h : w).get(); }
};

template <typename E>
void load_queries(const Problem<E>& p, const Tile& t, E* q) {
  p.load_operands(q, t.queries(), p.q_dtype, p.asking(p.strides, p.q_dtype, t.group),
                  [&](int64_t i) { return p.q_row(t.group, p.query(t, i)); });
}

template <typename E, typename C = Sum<E>>
Buffer<C> load_table(const Problem<E>& p, const Tensor& table) {
  Buffer<C> all(p.shape.table_rows() * p.d_padded);
  const char* src = static_cast<const char*>(table.const_data_ptr());
  const Asking ask{p.shape.D * bytes_of(p.q_dtype), 0};
  p.load_rows(all.get(), p.shape.table_rows(), p.q_dtype, ask, [&](int64_t r) { return src + r * ask.bytes; });
  return all;
}

template <typename E>
void arrange_all(const Shape& s, const int32_t* index, const Sum<E>* table, bool forward, AxisRows<E>* axes) {
  for (int a = 0; a < kAxes; ++a)
    if (s.axis[a].rows) axes[a] = arrange<E>(s, s.axis[a], index, table, forward);
}

// ---- forward
template <typename E>
void compute_factors(const Problem<E>& p, const Tile& tile, const AxisRows<E>* axes, const Scratch<E>& mine) {
  const Shape& s = p.shape;
  for (int a = 0; a < kAxes; ++a) {
    if (!s.axis[a].rows) continue;
    const int64_t ld = p.factor_ld(a);
    for_each_sharing(s, tile, a, [&](const Sharing& x) {
      p.gemm({x.count, ld, elements<E>(s.D), mine.q.get() + x.first * p.e_padded(), x.step * p.e_padded(), 1,
              axes[a].by_column(x.coordinate, s.D), axes[a].column_ld, mine.factors(a) + x.first * ld, x.step * ld,
              false});
    });
  }
}

// ---- backward
inline int64_t longest_axis(const Shape& s) {  // keys of one coordinate, at most: rows of table_gradient's block
  int64_t keys = 0;
  for (const Axis& a : s.axis) keys = std::max<int64_t>(keys, a.keys);
  return keys;
}

// dq, [queries, D padded]: set, or added to what is there.
template <typename E>
void query_gradient(const Problem<E>& p, const Tile& tile, const AxisRows<E>* axes, const Scratch<E>& mine, Sum<E>* dq,
                    bool accumulate) {
  const Shape& s = p.shape;
  for (int a = 0; a < kAxes; ++a) {
    if (!s.axis[a].rows) continue;
    const int64_t ld = p.factor_ld(a);
    for_each_sharing(s, tile, a, [&](const Sharing& x) {
      p.run.gemm({x.count, p.d_padded, s.axis[a].keys, mine.factors(a) + x.first * ld, x.step * ld, 1,
                  axes[a].by_row(x.coordinate), axes[a].row_ld(), dq + x.first * p.d_padded, x.step * p.d_padded,
                  accumulate});
    });
    accumulate = true;
  }
}

// dtable, [rows, D padded], each axis back to front like AxisRows. q: the queries, as numbers.
template <typename E, typename C = Sum<E>>
void table_gradient(const Problem<E>& p, const Tile& tile, const AxisRows<E>* axes, const Scratch<E>& mine, const C* q,
                    C* block, C* dtable) {
  const Shape& s = p.shape;
  for (int a = 0; a < kAxes; ++a) {
    if (!s.axis[a].rows) continue;
    const AxisRows<E>& r = axes[a];
    const int64_t ld = p.factor_ld(a), keys = s.axis[a].keys;
    C* axis_gradient = dtable + s.axis[a].first_row * p.d_padded;
    for_each_sharing(s, tile, a, [&](const Sharing& x) {
      C* into = r.gathered ? block : axis_gradient + r.start(x.coordinate) * p.d_padded;
      p.run.gemm({keys, p.d_padded, x.count, mine.factors(a) + x.first * ld, 1, x.step * ld, q + x.first * p.d_padded,
                  x.step * p.d_padded, into, r.row_ld(), !r.gathered});
      for (int64_t i = 0; r.gathered && i < keys; ++i) {
        C* row = axis_gradient + (r.last_row() - r.index[x.coordinate * keys + i]) * p.d_padded;
        for (int64_t d = 0; d < s.D; ++d) row[d] += block[i * p.d_padded + d];
      }
    });
  }
}

constexpr int64_t kSlices = 128;  // of the table gradient; fixed, so that sums never depend on the machine

// The slices of the table gradient, [slices, rows, D padded], summed in order.
template <typename E, typename C = Sum<E>>
void sum_slices(const Problem<E>& p, const C* partial, int64_t slices, Tensor& dtable) {
  const Shape& s = p.shape;
  const int64_t slice_size = s.table_rows() * p.d_padded;
  const Dtype dtype = dtype_of("dtable", dtable);
  char* dtable_data = static_cast<char*>(dtable.mutable_data_ptr());
  parallel_for(0, s.table_rows(), 16, [&](int64_t begin, int64_t end) {
    const Buffer<C> sum(p.d_padded);
    for (int64_t r = begin; r < end; ++r) {
      int a = kT;
      while (r < s.axis[a].first_row || r >= s.axis[a].first_row + s.axis[a].rows) ++a;
      const int64_t back_to_front = 2 * s.axis[a].first_row + s.axis[a].rows - 1 - r;
      std::fill(sum.get(), sum.get() + s.D, C{});
      for (int64_t slice = 0; slice < slices; ++slice) {
        const C* row = partial + slice * slice_size + back_to_front * p.d_padded;
        for (int64_t d = 0; d < s.D; ++d) sum.get()[d] += row[d];
      }
      p.run.store(dtable_data + r * s.D * bytes_of(dtype), sum.get(), dtype, s.D);
    }
  });
}

}  // namespace relpos
