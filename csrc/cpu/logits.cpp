// logits.cpp - the logits op on the CPU: tiles, memory and threads around the loops of logits_kernels.h.
//
//   forward    out[m, n] = logits[m, n] + outer[m, image row of n] + inner[m, column of n]
//   backward   d_outer, d_inner = sums of grad over columns and over image rows;
//              dq[m]   = sum over axes, keys i of d[m, i] * R[c(m), i]
//              dR[c,i] = sum over queries m with coordinate c of d[m, i] * q[m]
//
// A tile is a few image rows of queries of one group ("lines") and a range of columns. With it, every
// product is a small dense matrix product: queries of one line share R of the h axis, queries of one
// column share R of the w axis. R itself is a window of the table where query and key grids agree, so it
// is not copied out. Table gradients are summed in a fixed number of slices, in a fixed order: the result
// does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../checks.h"
#include "logits_kernels.h"
#include "tiles.h"

namespace relpos {
namespace {

// ---- which instruction set
template <typename C>
const LogitsKernels<C>& pick(const LogitsKernels<float>& f, const LogitsKernels<double>& d) {
  if constexpr (sizeof(C) == 8)
    return d;
  else
    return f;
}

const char* instruction_set() {
  static const std::string chosen = [] {
#ifdef RELPOS_HAVE_X86_ISAS
    const char* cap = std::getenv("RELPOS_CUDA_CPU_ISA");
    const std::string most = cap && *cap ? cap : "avx512";
    const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (most == "avx512" && has512) return "avx512";
    if ((most == "avx512" || most == "avx2") && has2) return "avx2";
#endif
    return "baseline";
  }();
  return chosen.c_str();
}

template <typename C>
const LogitsKernels<C>& kernels() {
#ifdef RELPOS_HAVE_X86_ISAS
  if (!std::strcmp(instruction_set(), "avx512")) return pick<C>(avx512::kLogitsFloat, avx512::kLogitsDouble);
  if (!std::strcmp(instruction_set(), "avx2")) return pick<C>(avx2::kLogitsFloat, avx2::kLogitsDouble);
#endif
  return pick<C>(baseline::kLogitsFloat, baseline::kLogitsDouble);
}

Dtype dtype_of(const char* name, const Tensor& t) {
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

int64_t bytes_of(Dtype t) { return t == Dtype::kFloat64 ? 8 : t == Dtype::kFloat32 ? 4 : 2; }

// ---- one call of the op, everything resolved
template <typename C>
struct Problem {
  Shape shape;
  QueryStrides strides;
  const void* q;
  Dtype q_dtype, logits_dtype;
  const LogitsKernels<C>& run = kernels<C>();
  int64_t d_padded = padded<C>(shape.D);
  int64_t t_ld = padded<C>(shape.axis[kT].factors()), h_ld = padded<C>(shape.axis[kH].keys),
          w_ld = padded<C>(shape.axis[kW].keys);

  const void* q_row(int64_t group, int64_t m) const {
    return static_cast<const char*>(q) + row_offset(shape, strides, group, m) * bytes_of(q_dtype);
  }
  int64_t logits_offset(int64_t group, int64_t m, int64_t n) const {
    return ((group * shape.M() + m) * shape.N() + n) * bytes_of(logits_dtype);
  }
  int64_t query(const Tile& t, int64_t i) const {  // token of the i-th query of a tile
    return shape.prefix + (t.line + i / t.columns) * shape.axis[kW].queries + t.column + i % t.columns;
  }
};

// Working memory of one thread: q and the factors of a tile.
template <typename C>
struct Scratch {
  Buffer<C> q, t, h, w, outer;
  Scratch(const Problem<C>& p, int64_t queries)
      : q(queries * p.d_padded),
        t(queries * p.t_ld),
        h(queries * p.h_ld),
        w(queries * p.w_ld),
        outer(padded<C>(p.shape.outer_keys())) {}
  C* factors(int a) const { return (a == kT ? t : a == kH ? h : w).get(); }
};

template <typename C>
int64_t factor_ld(const Problem<C>& p, int a) {
  return a == kT ? p.t_ld : a == kH ? p.h_ld : p.w_ld;
}

template <typename C>
void load_queries(const Problem<C>& p, const Tile& t, C* q) {
  for (int64_t i = 0; i < t.queries(); ++i)
    p.run.load(q + i * p.d_padded, p.q_row(t.group, p.query(t, i)), p.q_dtype, p.shape.D);
}

template <typename C>
Buffer<C> load_table(const Problem<C>& p, const Tensor& table) {
  Buffer<C> all(p.shape.table_rows() * p.d_padded);
  const char* src = static_cast<const char*>(table.const_data_ptr());
  for (int64_t r = 0; r < p.shape.table_rows(); ++r)
    p.run.load(all.get() + r * p.d_padded, src + r * p.shape.D * bytes_of(p.q_dtype), p.q_dtype, p.shape.D);
  return all;
}

// ---- forward
template <typename C>
void forward_tile(const Problem<C>& p, const Tile& tile, const AxisRows<C>* axes, const Scratch<C>& mine, char* out,
                  const char* logits) {
  const Shape& s = p.shape;
  load_queries(p, tile, mine.q.get());
  for (int a = 0; a < kAxes; ++a) {
    if (!s.axis[a].rows) continue;
    const int64_t ld = factor_ld(p, a);
    for_each_sharing(s, tile, a, [&](const Sharing& x) {
      p.run.gemm({x.count, ld, s.D, mine.q.get() + x.first * p.d_padded, x.step * p.d_padded, 1,
                  axes[a].by_column(x.coordinate, s.D), axes[a].column_ld, mine.factors(a) + x.first * ld, x.step * ld,
                  false});
    });
  }
  const int64_t keys_t = s.axis[kT].keys, keys_h = s.axis[kH].keys;
  for (int64_t i = 0; i < tile.queries(); ++i) {
    const C* h = mine.h.get() + i * p.h_ld;
    const C* outer = h;
    if (s.axis[kT].rows) {
      const C* t = mine.t.get() + i * p.t_ld;
      for (int64_t o = 0; o < keys_t * keys_h; ++o) mine.outer.get()[o] = t[o / keys_h] + h[o % keys_h];
      outer = mine.outer.get();
    }
    const int64_t at = p.logits_offset(tile.group, p.query(tile, i), s.prefix);
    const int64_t before = s.prefix * bytes_of(p.logits_dtype);
    if (out != logits && before) std::memcpy(out + at - before, logits + at - before, before);
    p.run.add_row(out + at, logits + at, p.logits_dtype, outer, mine.w.get() + i * p.w_ld, s.outer_keys(),
                  s.axis[kW].keys);
  }
}

template <typename C>
void forward(const Problem<C>& p, Tensor& out, const Tensor& logits, const Tensor& table, const int32_t* index) {
  const Shape& s = p.shape;
  char* dst = static_cast<char*>(out.mutable_data_ptr());
  const char* src = static_cast<const char*>(logits.const_data_ptr());
  const Buffer<C> all = load_table(p, table);
  AxisRows<C> axes[kAxes];
  for (int a = 0; a < kAxes; ++a)
    if (s.axis[a].rows) axes[a] = arrange(s, s.axis[a], index, all.get(), true);
  const Tiling tiles(s);
  torch::stable::parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<C> mine(p, tiles.max_queries());
    for (int64_t i = begin; i < end; ++i) forward_tile(p, tiles[i], axes, mine, dst, src);
  });
  if (dst == src || !s.prefix) return;
  for (int64_t g = 0; g < s.groups; ++g)  // the class tokens' own rows
    std::memcpy(dst + p.logits_offset(g, 0, 0), src + p.logits_offset(g, 0, 0),
                s.prefix * s.N() * bytes_of(p.logits_dtype));
}

// ---- backward
template <typename C>
void sum_gradients(const Problem<C>& p, const Tile& tile, const char* grad, const Scratch<C>& mine) {
  const Shape& s = p.shape;
  const int64_t keys_t = s.axis[kT].keys, keys_h = s.axis[kH].keys;
  for (int64_t i = 0; i < tile.queries(); ++i) {
    C* h = mine.h.get() + i * p.h_ld;
    C* outer = s.axis[kT].rows ? mine.outer.get() : h;
    p.run.sum_row(grad + p.logits_offset(tile.group, p.query(tile, i), s.prefix), p.logits_dtype, outer,
                  mine.w.get() + i * p.w_ld, s.outer_keys(), s.axis[kW].keys);
    if (!s.axis[kT].rows) continue;
    C* t = mine.t.get() + i * p.t_ld;
    std::fill(h, h + keys_h, C{});
    std::fill(t, t + keys_t, C{});
    for (int64_t o = 0; o < keys_t * keys_h; ++o) t[o / keys_h] += outer[o], h[o % keys_h] += outer[o];
  }
}

template <typename C>
void query_gradient(const Problem<C>& p, const Tile& tile, const AxisRows<C>* axes, const Scratch<C>& mine, char* dq) {
  const Shape& s = p.shape;
  bool accumulate = false;
  for (int a = 0; a < kAxes; ++a) {
    if (!s.axis[a].rows) continue;
    const int64_t ld = factor_ld(p, a);
    for_each_sharing(s, tile, a, [&](const Sharing& x) {
      p.run.gemm({x.count, p.d_padded, s.axis[a].keys, mine.factors(a) + x.first * ld, x.step * ld, 1,
                  axes[a].by_row(x.coordinate), p.d_padded, mine.q.get() + x.first * p.d_padded, x.step * p.d_padded,
                  accumulate});
    });
    accumulate = true;
  }
  for (int64_t i = 0; i < tile.queries(); ++i) {
    const int64_t row = tile.group * s.M() + p.query(tile, i);
    p.run.store(dq + row * s.D * bytes_of(p.q_dtype), mine.q.get() + i * p.d_padded, p.q_dtype, s.D);
  }
}

// dtable, [rows, D padded], each axis back to front like AxisRows.
template <typename C>
void table_gradient(const Problem<C>& p, const Tile& tile, const AxisRows<C>* axes, const Scratch<C>& mine, C* block,
                    C* dtable) {
  const Shape& s = p.shape;
  for (int a = 0; a < kAxes; ++a) {
    if (!s.axis[a].rows) continue;
    const AxisRows<C>& r = axes[a];
    const int64_t ld = factor_ld(p, a), keys = s.axis[a].keys;
    C* axis_gradient = dtable + s.axis[a].first_row * p.d_padded;
    for_each_sharing(s, tile, a, [&](const Sharing& x) {
      C* into = r.windowed ? axis_gradient + r.start(x.coordinate) * p.d_padded : block;
      p.run.gemm({keys, p.d_padded, x.count, mine.factors(a) + x.first * ld, 1, x.step * ld,
                  mine.q.get() + x.first * p.d_padded, x.step * p.d_padded, into, p.d_padded, r.windowed});
      for (int64_t i = 0; !r.windowed && i < keys; ++i) {
        C* row = axis_gradient + (r.last_row() - r.index[x.coordinate * keys + i]) * p.d_padded;
        for (int64_t d = 0; d < s.D; ++d) row[d] += block[i * p.d_padded + d];
      }
    });
  }
}

constexpr int64_t kSlices = 128;  // of the table gradient; fixed, so that sums never depend on the machine

template <typename C>
void backward(const Problem<C>& p, const Tensor& grad, std::optional<Tensor>& dq, std::optional<Tensor>& dtable,
              const Tensor& table, const int32_t* index) {
  const Shape& s = p.shape;
  const char* g = static_cast<const char*>(grad.const_data_ptr());
  char* dq_data = dq ? static_cast<char*>(dq->mutable_data_ptr()) : nullptr;
  const Buffer<C> all = load_table(p, table);
  AxisRows<C> axes[kAxes];
  for (int a = 0; a < kAxes; ++a)
    if (s.axis[a].rows) axes[a] = arrange(s, s.axis[a], index, all.get(), false);
  const Tiling tiles(s);
  const int64_t slices = std::min(kSlices, tiles.count()), slice_size = s.table_rows() * p.d_padded;
  const Buffer<C> partial(dtable ? slices * slice_size : 0);
  int64_t keys = 0;
  for (const Axis& a : s.axis) keys = std::max<int64_t>(keys, a.keys);
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    const Scratch<C> mine(p, tiles.max_queries());
    const Buffer<C> block(keys * p.d_padded);
    for (int64_t slice = begin; slice < end; ++slice)
      for (int64_t i = tiles.count() * slice / slices; i < tiles.count() * (slice + 1) / slices; ++i) {
        const Tile tile = tiles[i];
        sum_gradients(p, tile, g, mine);
        if (dtable) {
          load_queries(p, tile, mine.q.get());
          table_gradient(p, tile, axes, mine, block.get(), partial.get() + slice * slice_size);
        }
        if (dq) query_gradient(p, tile, axes, mine, dq_data);
      }
  });
  if (dq && s.prefix)
    for (int64_t group = 0; group < s.groups; ++group)
      std::memset(dq_data + group * s.M() * s.D * bytes_of(p.q_dtype), 0, s.prefix * s.D * bytes_of(p.q_dtype));
  if (!dtable) return;
  const Dtype dtype = dtype_of("dtable", *dtable);
  char* dtable_data = static_cast<char*>(dtable->mutable_data_ptr());
  torch::stable::parallel_for(0, s.table_rows(), 16, [&](int64_t begin, int64_t end) {
    const Buffer<C> sum(p.d_padded);
    for (int64_t r = begin; r < end; ++r) {
      int a = kT;
      while (r < s.axis[a].first_row || r >= s.axis[a].first_row + s.axis[a].rows) ++a;
      const int64_t back_to_front = 2 * s.axis[a].first_row + s.axis[a].rows - 1 - r;
      std::fill(sum.get(), sum.get() + s.D, C{});
      for (int64_t slice = 0; slice < slices; ++slice) {
        const C* row = partial.get() + slice * slice_size + back_to_front * p.d_padded;
        for (int64_t d = 0; d < s.D; ++d) sum.get()[d] += row[d];
      }
      p.run.store(dtable_data + r * s.D * bytes_of(dtype), sum.get(), dtype, s.D);
    }
  });
}

// ---- ops
void check_logits(const char* name, const Tensor& t, const Shape& s, const Tensor& q) {
  const bool same = t.scalar_type() == q.scalar_type();
  RELPOS_CHECK(same || (t.scalar_type() == ScalarType::Float && q.scalar_type() != ScalarType::Double), name, " is ",
               name_of(t.scalar_type()), ", q is ", name_of(q.scalar_type()));
  check_buffer(name, t, q, t.scalar_type(), s.rows() * s.N());
}

template <typename F>
void with_problem(const Shape& s, const QueryStrides& strides, const Tensor& q, const Tensor& logits, F&& f) {
  const Dtype q_dtype = dtype_of("q", q), logits_dtype = dtype_of("attn", logits);
  if (q_dtype == Dtype::kFloat64)
    f(Problem<double>{s, strides, q.const_data_ptr(), q_dtype, logits_dtype});
  else
    f(Problem<float>{s, strides, q.const_data_ptr(), q_dtype, logits_dtype});
}

void logits_fwd(Tensor out, const std::optional<Tensor>& attn, const Tensor& q, const Tensor& table,
                const Tensor& index, std::vector<int64_t> q_size, std::vector<int64_t> k_size, int64_t prefix) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  const Tensor& logits = attn ? *attn : out;
  check_logits("out", out, s, q);
  check_buffer("attn", logits, q, out.scalar_type(), out.numel());
  if (s.groups == 0) return;
  with_problem(s, strides, q, out,
               [&](const auto& p) { forward(p, out, logits, table, index.const_data_ptr<int32_t>()); });
}

void logits_bwd(std::optional<Tensor> dq, std::optional<Tensor> dtable, const Tensor& grad, const Tensor& q,
                const Tensor& table, const Tensor& index, const std::optional<Tensor>& /*factors*/,
                const std::optional<Tensor>& /*partials*/, std::vector<int64_t> q_size, std::vector<int64_t> k_size,
                int64_t prefix) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  check_logits("grad", grad, s, q);
  if (dq) check_buffer("dq", *dq, q, q.scalar_type(), q.numel());
  if (dtable)
    check_buffer("dtable", *dtable, q, q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float,
                 table.numel());
  if (s.groups == 0) {
    if (dtable) std::memset(dtable->mutable_data_ptr(), 0, dtable->numel() * bytes_of(dtype_of("dtable", *dtable)));
    return;
  }
  with_problem(s, strides, q, grad,
               [&](const auto& p) { backward(p, grad, dq, dtable, table, index.const_data_ptr<int32_t>()); });
}

STABLE_TORCH_LIBRARY_IMPL(relpos_cuda, CPU, m) {
  m.impl("logits_fwd", TORCH_BOX(&logits_fwd));
  m.impl("logits_bwd", TORCH_BOX(&logits_bwd));
}

}  // namespace
}  // namespace relpos

extern "C" __attribute__((visibility("default"))) const char* relpos_cuda_cpu_isa() {
  return relpos::instruction_set();
}
