// attention_bwd.cpp - gradients of the attention on the CPU; scores are computed again, block by block, from lse.
//
//   p[m, n]  = exp(score[m, n] - lse[m])                dv[n] = sum over m of p[m, n] * grad[m]
//   dp[m, n] = <grad[m], v[n]>                          dk[n] = scale * sum over m of ds[m, n] * q[m]
//   ds[m, n] = p[m, n] * (dp[m, n] - delta[m])          dq[m] = scale * sum over n of ds[m, n] * k[n] + bias part
//   delta[m] = <grad[m], out[m]>                        d_outer, d_inner = ds summed over columns, over image rows
//
//      part 0 of the queries    part 1                  a task is (group, part): its tiles one after another, each as
//     +--------+--------+--------+--------+             in attention_fwd.cpp. From the factor gradients of a tile,
//     | tile 0 | tile 1 | tile 2 | ..     |             still in cache, factors.h makes the bias part of dq and the
//     +--------+--------+--------+--------+             gradient of the table.
//        dk, dv of part 0        of part 1
//
//   memory   beside what the forward holds, dp [block, kStrip] and dq of a strip; dk and dv of a task in the
//            compute type. With several parts per group those of all tasks are kept until they are added. Where
//            products are of pairs: the operands of a strip and a block, packed.
//   order    parts depend on the sizes of the problem only, and are added in order; table gradients are summed
//            in fixed slices of tasks. The number of threads changes nothing.
#include "../boundary.h"
#include "attention.h"

namespace relpos {
namespace {

constexpr int64_t kWantedTasks = 24, kMostParts = 8;  // few groups are split, so that more processors find work

// What the gradients go to; without data where they are not wanted.
struct Gradients {
  Rows dq, dk, dv;
  bool table = false;
};

template <typename E>
struct Backward : Attention<E> {
  Rows out, grad;
  const Sum<E>* lse;
  Gradients to;
};

template <typename E>
struct BackwardScratch : AttentionScratch<E> {
  using C = Sum<E>;
  Buffer<E> grad_rows;             // of a tile, as operands
  Buffer<C> dq_rows, q_numbers;    // [queries, D padded]; the latter where operands are pairs
  Buffer<E> grad;                  // of a strip, one query per lane
  Buffer<C> dq, d_outer, d_inner;  // the same
  Buffer<C> d_scores, lse, delta, grad_and_out, block;
  Buffer<E> d_along, d_across, q_across, grad_across;  // operands, where those are pairs
  BackwardScratch(const Attention<E>& p, int64_t queries)
      : AttentionScratch<E>(p, queries, Keys<E>::kAlong | Keys<E>::kAcross, Keys<E>::kAlong),
        grad_rows(queries * p.e_padded()),
        dq_rows(queries * p.d_padded),
        q_numbers(Attention<E>::kPairs ? queries * p.d_padded : 0),
        grad(p.e_padded() * kStrip),
        dq(p.d_padded * kStrip),
        d_outer(p.shape.outer_keys() * kStrip),
        d_inner(p.shape.axis[kW].keys * kStrip),
        d_scores(KeyBlocks(p.shape.N()).size * kStrip),
        lse(kStrip),
        delta(kStrip),
        grad_and_out(2 * p.d_padded),
        block(longest_axis(p.shape) * p.d_padded),
        d_along(p.room(KeyBlocks(p.shape.N()).size * kStrip)),
        d_across(p.room(KeyBlocks(p.shape.N()).size * kStrip)),
        q_across(p.room(p.d_padded * kStrip)),
        grad_across(p.room(p.d_padded * kStrip)) {}
};

// lse and delta of a strip, which a block of all keys has no use for; grad, one query per lane.
template <typename E, typename C = Sum<E>>
void load_statistics(const Backward<E>& p, const QueryTile& tile, int64_t first, int64_t count,
                     const BackwardScratch<E>& mine) {
  const Shape& s = p.shape;
  const E* rows = mine.grad_rows.get() + first * p.e_padded();
  C *room = mine.grad_and_out.get(), *out = room + p.d_padded;
  const bool whole = KeyBlocks(s.N()).count == 1;
  for (int64_t i = 0; i < count && !whole; ++i) {
    const int64_t token = tile.token(p, first + i);
    mine.lse.get()[i] = p.lse[tile.group * s.M() + token];
    const C* grad = p.numbers(rows + i * p.e_padded(), 1, room);
    p.run.load(out, p.out.at(s, tile.group, token), p.out.dtype, s.D);
    double sum = 0;
    for (int64_t d = 0; d < s.D; ++d) sum += static_cast<double>(grad[d]) * out[d];
    mine.delta.get()[i] = static_cast<C>(sum);
  }
  p.transpose(mine.grad.get(), rows, count);
}

// Factor gradients of a strip to rows of the tile, where the products of factors.h read them.
template <typename E, typename C = Sum<E>>
void store_factor_gradients(const Attention<E>& p, int64_t first, int64_t count, const BackwardScratch<E>& mine) {
  const Shape& s = p.shape;
  const int64_t keys_t = s.axis[kT].keys, keys_h = s.axis[kH].keys;
  const Scratch<E>& tile = mine.tile;
  p.steps.transpose(tile.w.get() + first * p.w_ld, p.w_ld, mine.d_inner.get(), kStrip, s.axis[kW].keys, count, C{1});
  if (!s.axis[kT].rows) {
    p.steps.transpose(tile.h.get() + first * p.h_ld, p.h_ld, mine.d_outer.get(), kStrip, keys_h, count, C{1});
    return;
  }
  C *t = mine.h_t.get(), *h = t + keys_t * kStrip;
  std::fill(t, h + keys_h * kStrip, C{});
  for (int64_t o = 0; o < keys_t * keys_h; ++o)
    for (int64_t i = 0; i < count; ++i) {
      const C d = mine.d_outer.get()[o * kStrip + i];
      t[o / keys_h * kStrip + i] += d;
      h[o % keys_h * kStrip + i] += d;
    }
  p.steps.transpose(tile.t.get() + first * p.t_ld, p.t_ld, t, kStrip, keys_t, count, C{1});
  p.steps.transpose(tile.h.get() + first * p.h_ld, p.h_ld, h, kStrip, keys_h, count, C{1});
}

template <typename E, typename C = Sum<E>>
void strip_gradients(const Backward<E>& p, int64_t first, int64_t count, const BackwardScratch<E>& mine, C* dk, C* dv) {
  const Shape& s = p.shape;
  const int64_t lanes = padded<C>(count), ld = p.d_padded;
  const KeyBlocks blocks(s.N());
  const auto across = [&](const Buffer<E>& rows, const Buffer<E>& room) {
    return p.across(rows.get() + first * p.e_padded(), p.e_padded(), count, s.D, room);
  };
  const E *q_rows = across(mine.tile.q, mine.q_across), *grad_rows = across(mine.grad_rows, mine.grad_across);
  E *weights = p.place(mine.scores, mine.score_pairs), *ds = p.place(mine.d_scores, mine.d_along);
  std::fill(mine.d_outer.get(), mine.d_outer.get() + s.outer_keys() * kStrip, C{});
  std::fill(mine.d_inner.get(), mine.d_inner.get() + s.axis[kW].keys * kStrip, C{});
  for (int64_t n = 0; n < blocks.keys; n += blocks.size) {
    const int64_t keys = blocks.length(n);
    C* d = mine.d_scores.get();
    p.gemm({keys, lanes, elements<E>(s.D), mine.v.along(p, n), p.e_padded(), 1, mine.grad.get(), kStrip, d, kStrip,
            false});
    p.block().gradients(score_product(p, n, keys, count, mine), score_block(p, n, keys, count, mine), d, mine.lse.get(),
                        mine.delta.get(), mine.d_outer.get(), mine.d_inner.get(), weights, ds);
    const auto add_rows = [&](const E* weights, const E* rows, C* to) {
      p.gemm({keys, ld, elements<E>(count), weights, elements<E>(kStrip), 1, rows, ld, to + n * ld, ld, true});
    };
    if (p.to.dv.data) add_rows(weights, grad_rows, dv);
    if (p.to.dk.data) add_rows(ds, q_rows, dk);
    if (p.to.dq.data)
      p.gemm({s.D, lanes, elements<E>(keys), mine.k.across(p, n), 1, ld,
              p.across(ds, elements<E>(kStrip), keys, lanes, mine.d_across), kStrip, mine.dq.get(), kStrip, n != 0});
  }
}

template <typename E, typename C = Sum<E>>
void tile_gradients(const Backward<E>& p, const QueryTile& tile, const AxisRows<E>* columns, const AxisRows<E>* rows,
                    const BackwardScratch<E>& mine, C* dk, C* dv, C* dtable) {
  const Shape& s = p.shape;
  load_tile(p, tile, columns, mine);
  p.load_operands(mine.grad_rows.get(), tile.count, p.grad.dtype, p.asking(p.grad.strides, p.grad.dtype, tile.group),
                  [&](int64_t i) { return p.grad.at(s, tile.group, tile.token(p, i)); });
  for (int64_t first = 0; first < tile.count; first += kStrip) {
    const int64_t count = std::min(kStrip, tile.count - first);
    load_strip(p, tile, first, count, mine);
    load_statistics(p, tile, first, count, mine);
    strip_gradients(p, first, count, mine, dk, dv);
    if (tile.biased) store_factor_gradients(p, first, count, mine);
    p.steps.transpose(mine.dq_rows.get() + first * p.d_padded, p.d_padded, mine.dq.get(), kStrip, s.D, count, p.scale);
  }
  if (tile.biased && p.to.table) {
    const C* q = p.numbers(mine.tile.q.get(), tile.count, mine.q_numbers.get());
    table_gradient(p, tile.grid, rows, mine.tile, q, mine.block.get(), dtable);
  }
  if (!p.to.dq.data) return;
  if (tile.biased) query_gradient(p, tile.grid, rows, mine.tile, mine.dq_rows.get(), true);
  for (int64_t i = 0; i < tile.count; ++i)
    p.run.store(p.to.dq.at(s, tile.group, tile.token(p, i)), mine.dq_rows.get() + i * p.d_padded, p.to.dq.dtype, s.D);
}

// dk, times scale, and dv of one group: the sum of its parts.
template <typename E, typename C = Sum<E>>
void store_key_gradients(const Backward<E>& p, int64_t group, int64_t parts, C* all) {
  const int64_t size = p.shape.N() * p.d_padded;
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < 2 * size; ++i) all[i] += all[part * 2 * size + i];
  for (int64_t i = 0; i < size; ++i) all[i] *= p.scale;
  if (p.to.dk.data) p.store_tokens(p.to.dk, group, p.shape.N(), all);
  if (p.to.dv.data) p.store_tokens(p.to.dv, group, p.shape.N(), all + size);
}

template <typename E, typename C = Sum<E>>
void backward(const Backward<E>& p, std::optional<Tensor>& dtable, const Tensor& table, const int32_t* index) {
  const Shape& s = p.shape;
  const Buffer<C> all = load_table(p, table);
  AxisRows<E> columns[kAxes], rows[kAxes];
  arrange_all(s, index, all.get(), true, columns);
  arrange_all(s, index, all.get(), false, rows);
  const QueryTiles tiles(s);
  const int64_t parts = std::min({tiles.per_group(), ceil_div(kWantedTasks, s.groups), kMostParts});
  const int64_t tasks = s.groups * parts, slices = std::min(kSlices, tasks);
  const int64_t slice_size = s.table_rows() * p.d_padded, keys_size = 2 * s.N() * p.d_padded;
  const Buffer<C> partial(dtable ? slices * slice_size : 0), kept(parts > 1 ? tasks * keys_size : 0);
  parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    BackwardScratch<E> mine(p, tiles.max_queries());
    const Buffer<C> own(parts > 1 ? 0 : keys_size);
    for (int64_t task = tasks * begin / slices; task < tasks * end / slices; ++task) {
      const int64_t group = task / parts, part = task % parts;
      const int64_t slice = ((task + 1) * slices - 1) / tasks;  // the one with tasks * slice / slices <= task
      C* dk = parts > 1 ? kept.get() + task * keys_size : own.get();
      if (parts == 1) std::fill(dk, dk + keys_size, C{});
      mine.load_group(p, group);
      for (int64_t i = tiles.per_group() * part / parts; i < tiles.per_group() * (part + 1) / parts; ++i)
        tile_gradients(p, tiles.get(group, i), columns, rows, mine, dk, dk + keys_size / 2,
                       partial.get() + slice * slice_size);
      if (parts == 1) store_key_gradients(p, group, 1, dk);
    }
  });
  if (parts > 1)
    parallel_for(0, s.groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) store_key_gradients(p, g, parts, kept.get() + g * parts * keys_size);
    });
  if (dtable) sum_slices(p, partial.get(), slices, *dtable);
}

// ---- op; the work spaces are those of the CUDA kernels
void attention_bwd(std::optional<Tensor> dq, std::optional<Tensor> dk, std::optional<Tensor> dv,
                   std::optional<Tensor> dtable, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const Tensor& table, const Tensor& index,
                   const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                   const std::optional<Tensor>&, std::vector<int64_t> q_size, std::vector<int64_t> k_size,
                   int64_t prefix, double scale) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  const Rows k_rows = rows_like("k", k, q, s, s.N()), v_rows = rows_like("v", v, q, s, s.N()),
             out_rows = rows_like("out", out, q, s, s.M()), grad_rows = rows_like("grad", grad, q, s, s.M());
  check_buffer("lse", lse, q, wide_type_of(q), s.rows());
  Gradients to;
  if (dq) to.dq = rows_like("dq", *dq, q, s, s.M());
  if (dk) to.dk = rows_like("dk", *dk, q, s, s.N());
  if (dv) to.dv = rows_like("dv", *dv, q, s, s.N());
  to.table = dtable.has_value();
  if (dtable) check_buffer("dtable", *dtable, q, wide_type_of(q), table.numel());
  if (s.groups == 0) {
    if (dtable) std::memset(dtable->mutable_data_ptr(), 0, dtable->numel() * bytes_of(dtype_of("dtable", *dtable)));
    return;
  }
  with_element(q, [&](auto element) {
    using E = decltype(element);
    using C = Sum<E>;
    const Attention<E> a{{s, strides, q.const_data_ptr(), dtype_of("q", q)}, static_cast<C>(scale), k_rows, v_rows};
    backward(Backward<E>{a, out_rows, grad_rows, static_cast<const C*>(lse.const_data_ptr()), to}, dtable, table,
             index.const_data_ptr<int32_t>());
  });
}

STABLE_TORCH_LIBRARY_IMPL(relpos_cuda, CPU, m) { m.impl("attention_bwd", boxed<&attention_bwd>); }

}  // namespace
}  // namespace relpos
