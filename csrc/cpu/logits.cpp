// logits.cpp - the logits op on the CPU: tiles, memory and threads around the loops of logits_kernels.h.
//
//   forward    out[m, n] = logits[m, n] + outer[m, image row of n] + inner[m, column of n]
//   backward   d_outer, d_inner = sums of grad over columns and over image rows;
//              dq[m]   = sum over axes, keys i of d[m, i] * R[c(m), i]
//              dR[c,i] = sum over queries m with coordinate c of d[m, i] * q[m]
//
// Factors, and what follows from their gradients: factors.h.
#include <algorithm>
#include <cstring>

#include "../boundary.h"
#include "factors.h"

namespace relpos {
namespace {

template <typename E>
struct LogitsProblem : Problem<E> {
  Dtype logits_dtype;

  int64_t logits_offset(int64_t group, int64_t m, int64_t n) const {
    return ((group * this->shape.M() + m) * this->shape.N() + n) * bytes_of(logits_dtype);
  }
};

// ---- forward
template <typename E, typename C = Sum<E>>
void forward_tile(const LogitsProblem<E>& p, const Tile& tile, const AxisRows<E>* axes, const Scratch<E>& mine,
                  char* out, const char* logits) {
  const Shape& s = p.shape;
  load_queries(p, tile, mine.q.get());
  compute_factors(p, tile, axes, mine);
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

template <typename E>
void forward(const LogitsProblem<E>& p, Tensor& out, const Tensor& logits, const Tensor& table, const int32_t* index) {
  const Shape& s = p.shape;
  char* dst = static_cast<char*>(out.mutable_data_ptr());
  const char* src = static_cast<const char*>(logits.const_data_ptr());
  const auto all = load_table(p, table);
  AxisRows<E> axes[kAxes];
  arrange_all(s, index, all.get(), true, axes);
  const Tiling tiles(s);
  parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch<E> mine(p, tiles.max_queries());
    for (int64_t i = begin; i < end; ++i) forward_tile(p, tiles[i], axes, mine, dst, src);
  });
  if (dst == src || !s.prefix) return;
  for (int64_t g = 0; g < s.groups; ++g)  // the class tokens' own rows
    std::memcpy(dst + p.logits_offset(g, 0, 0), src + p.logits_offset(g, 0, 0),
                s.prefix * s.N() * bytes_of(p.logits_dtype));
}

// ---- backward
template <typename C>
void sum_gradients(const LogitsProblem<C>& p, const Tile& tile, const char* grad, const Scratch<C>& mine) {
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
void store_query_gradient(const Problem<C>& p, const Tile& tile, const C* rows, char* dq) {
  const Shape& s = p.shape;
  for (int64_t i = 0; i < tile.queries(); ++i) {
    const int64_t row = tile.group * s.M() + p.query(tile, i);
    p.run.store(dq + row * s.D * bytes_of(p.q_dtype), rows + i * p.d_padded, p.q_dtype, s.D);
  }
}

template <typename C>
void backward(const LogitsProblem<C>& p, const Tensor& grad, std::optional<Tensor>& dq, std::optional<Tensor>& dtable,
              const Tensor& table, const int32_t* index) {
  const Shape& s = p.shape;
  const char* g = static_cast<const char*>(grad.const_data_ptr());
  char* dq_data = dq ? static_cast<char*>(dq->mutable_data_ptr()) : nullptr;
  const Buffer<C> all = load_table(p, table);
  AxisRows<C> axes[kAxes];
  arrange_all(s, index, all.get(), false, axes);
  const Tiling tiles(s);
  const int64_t slices = std::min(kSlices, tiles.count()), slice_size = s.table_rows() * p.d_padded;
  const Buffer<C> partial(dtable ? slices * slice_size : 0);
  parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    const Scratch<C> mine(p, tiles.max_queries());
    const Buffer<C> block(longest_axis(s) * p.d_padded);
    for (int64_t slice = begin; slice < end; ++slice)
      for (int64_t i = tiles.count() * slice / slices; i < tiles.count() * (slice + 1) / slices; ++i) {
        const Tile tile = tiles[i];
        sum_gradients(p, tile, g, mine);
        if (dtable) {
          load_queries(p, tile, mine.q.get());
          table_gradient(p, tile, axes, mine, mine.q.get(), block.get(), partial.get() + slice * slice_size);
        }
        if (dq) {
          query_gradient(p, tile, axes, mine, mine.q.get(), false);
          store_query_gradient(p, tile, mine.q.get(), dq_data);
        }
      }
  });
  if (dq && s.prefix)
    for (int64_t group = 0; group < s.groups; ++group)
      std::memset(dq_data + group * s.M() * s.D * bytes_of(p.q_dtype), 0, s.prefix * s.D * bytes_of(p.q_dtype));
  if (dtable) sum_slices(p, partial.get(), slices, *dtable);
}

// ---- ops
void check_logits(const char* name, const Tensor& t, const Shape& s, const Tensor& q) {
  const bool same = t.scalar_type() == q.scalar_type();
  RELPOS_CHECK(same || (t.scalar_type() == ScalarType::Float && q.scalar_type() != ScalarType::Double), name, " is ",
               name_of(t.scalar_type()), ", q is ", name_of(q.scalar_type()));
  check_buffer(name, t, q, t.scalar_type(), s.rows() * s.N());
}

template <typename E>
LogitsProblem<E> problem(const Shape& s, const QueryStrides& strides, const Tensor& q, const Tensor& logits) {
  return {{s, strides, q.const_data_ptr(), dtype_of("q", q)}, dtype_of("attn", logits)};
}

void logits_fwd(Tensor out, const std::optional<Tensor>& attn, const Tensor& q, const Tensor& table,
                const Tensor& index, std::vector<int64_t> q_size, std::vector<int64_t> k_size, int64_t prefix) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  const Tensor& logits = attn ? *attn : out;
  check_logits("out", out, s, q);
  check_buffer("attn", logits, q, out.scalar_type(), out.numel());
  if (s.groups == 0) return;
  with_element(q, [&](auto element) {
    forward(problem<decltype(element)>(s, strides, q, out), out, logits, table, index.const_data_ptr<int32_t>());
  });
}

void logits_bwd(std::optional<Tensor> dq, std::optional<Tensor> dtable, const Tensor& grad, const Tensor& q,
                const Tensor& table, const Tensor& index, const std::optional<Tensor>& /*factors*/,
                const std::optional<Tensor>& /*partials*/, std::vector<int64_t> q_size, std::vector<int64_t> k_size,
                int64_t prefix) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  check_logits("grad", grad, s, q);
  if (dq) check_buffer("dq", *dq, q, q.scalar_type(), q.numel());
  if (dtable) check_buffer("dtable", *dtable, q, wide_type_of(q), table.numel());
  if (s.groups == 0) {
    if (dtable) std::memset(dtable->mutable_data_ptr(), 0, dtable->numel() * bytes_of(dtype_of("dtable", *dtable)));
    return;
  }
  with_element(q, [&](auto element) {  // gradients of factors are numbers, and so is what they multiply
    backward(problem<Sum<decltype(element)>>(s, strides, q, grad), grad, dq, dtable, table,
             index.const_data_ptr<int32_t>());
  });
}

STABLE_TORCH_LIBRARY_IMPL(relpos_cuda, CPU, m) {
  m.impl("logits_fwd", boxed<&logits_fwd>);
  m.impl("logits_bwd", boxed<&logits_bwd>);
}

}  // namespace
}  // namespace relpos

extern "C" __attribute__((visibility("default"))) const char* relpos_cuda_cpu_isa() {
  return relpos::instruction_set();
}
