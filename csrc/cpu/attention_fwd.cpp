// attention_fwd.cpp - attention with a decomposed bias on the CPU; the M x N scores are never stored.
//
//   score[m, n] = scale * <q[m], k[n]> + outer[m, image row of n] + inner[m, column of n]
//   out[m]      = sum over n of softmax(score[m, :])[n] * v[n]
//   lse[m]      = log of the sum over n of exp(score[m, n])
//
//   a tile of queries (factors.h), a strip of 64 of them at a time          a strip, transposed
//
//        columns --->                                                            queries --->
//      +--------------+   outer [image rows, 64]                        k     +---------------+
//      | strip | strip|   inner [columns, 64]                           e     | 256 keys x 64 |  scores, then p
//      | strip | ..   |   q     [D, 64]                                 y     +---------------+
//      +--------------+   out   [D, 64]                                 s     | ..            |
//
//   memory   scores, factors, q and out of a strip stay in L2; k and v of the group are copied once per thread
//            and group, as operands of products, and read by every strip.
//   order    blocks of keys one after another, with the softmax of FlashAttention: what is there shrinks by
//            e^(largest before - largest now). Everything of one tile is done by one thread.
#include "../boundary.h"
#include "attention.h"

namespace relpos {
namespace {

template <typename E>
struct ForwardScratch : AttentionScratch<E> {
  Buffer<Sum<E>> out, rows, largest, sum, shrink;  // [D, kStrip], [kStrip, D padded], one value per lane
  ForwardScratch(const Attention<E>& p, int64_t queries)
      : AttentionScratch<E>(p, queries, Keys<E>::kAlong, Keys<E>::kAcross),
        out(p.d_padded * kStrip),
        rows(p.d_padded * kStrip),
        largest(kStrip),
        sum(kStrip),
        shrink(kStrip) {}
};

template <typename E, typename C = Sum<E>>
void attend_strip(const Attention<E>& p, int64_t count, const ForwardScratch<E>& mine) {
  const Shape& s = p.shape;
  const int64_t lanes = padded<C>(count);
  E* weights = p.place(mine.scores, mine.score_pairs);
  const KeyBlocks blocks(s.N());
  std::fill(mine.largest.get(), mine.largest.get() + lanes, -std::numeric_limits<C>::infinity());
  std::fill(mine.sum.get(), mine.sum.get() + lanes, C{});
  for (int64_t n = 0; n < blocks.keys; n += blocks.size) {
    const int64_t keys = blocks.length(n);
    p.block().softmax(score_product(p, n, keys, count, mine), score_block(p, n, keys, count, mine), weights,
                      mine.largest.get(), mine.sum.get(), mine.shrink.get());
    if (n) p.steps.scale_lanes(mine.out.get(), mine.shrink.get(), s.D, lanes);
    p.gemm({s.D, lanes, elements<E>(keys), mine.v.across(p, n), 1, p.d_padded, weights, kStrip, mine.out.get(), kStrip,
            n != 0});
  }
  C* inverse = mine.shrink.get();
  for (int64_t i = 0; i < lanes; ++i) inverse[i] = 1 / mine.sum.get()[i];
  p.steps.scale_lanes(mine.out.get(), inverse, s.D, lanes);
}

template <typename E, typename C = Sum<E>>
void forward_tile(const Attention<E>& p, const QueryTile& tile, const AxisRows<E>* axes, ForwardScratch<E>& mine,
                  const Rows& out, C* lse) {
  const Shape& s = p.shape;
  mine.load_group(p, tile.group);
  load_tile(p, tile, axes, mine);
  for (int64_t first = 0; first < tile.count; first += kStrip) {
    const int64_t count = std::min(kStrip, tile.count - first);
    load_strip(p, tile, first, count, mine);
    for (int64_t i = first; i < first + count; ++i)
      prefetch<1, 2>(out.at(s, tile.group, tile.token(p, i)), s.D * bytes_of(out.dtype));
    attend_strip(p, count, mine);
    p.steps.transpose(mine.rows.get(), p.d_padded, mine.out.get(), kStrip, s.D, count, C{1});
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = tile.token(p, first + i);
      p.run.store(out.at(s, tile.group, token), mine.rows.get() + i * p.d_padded, out.dtype, s.D);
      if (lse) lse[tile.group * s.M() + token] = mine.largest.get()[i] + std::log(mine.sum.get()[i]);
    }
  }
}

template <typename E, typename C = Sum<E>>
void forward(const Attention<E>& p, const Tensor& table, const int32_t* index, const Rows& out, C* lse) {
  const Buffer<C> all = load_table(p, table);
  AxisRows<E> axes[kAxes];
  arrange_all(p.shape, index, all.get(), true, axes);
  const QueryTiles tiles(p.shape);
  parallel_for(0, p.shape.groups * tiles.per_group(), 1, [&](int64_t begin, int64_t end) {
    ForwardScratch<E> mine(p, tiles.max_queries());
    for (int64_t i = begin; i < end; ++i)
      forward_tile(p, tiles.get(i / tiles.per_group(), i % tiles.per_group()), axes, mine, out, lse);
  });
}

void attention_fwd(Tensor out, std::optional<Tensor> lse, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& table, const Tensor& index, std::vector<int64_t> q_size, std::vector<int64_t> k_size,
                   int64_t prefix, double scale) {
  QueryStrides strides;
  const Shape s = check_problem(q, table, index, q_size, k_size, prefix, strides);
  const Rows k_rows = rows_like("k", k, q, s, s.N()), v_rows = rows_like("v", v, q, s, s.N()),
             out_rows = rows_like("out", out, q, s, s.M());
  if (lse) check_buffer("lse", *lse, q, wide_type_of(q), s.rows());
  if (s.groups == 0) return;
  with_element(q, [&](auto element) {
    using E = decltype(element);
    using C = Sum<E>;
    const Attention<E> p{{s, strides, q.const_data_ptr(), dtype_of("q", q)}, static_cast<C>(scale), k_rows, v_rows};
    forward(p, table, index.const_data_ptr<int32_t>(), out_rows,
            lse ? static_cast<C*>(lse->mutable_data_ptr()) : nullptr);
  });
}

STABLE_TORCH_LIBRARY_IMPL(relpos_cuda, CPU, m) { m.impl("attention_fwd", boxed<&attention_fwd>); }

}  // namespace

Rows rows_like(const char* name, const Tensor& t, const Tensor& q, const Shape& s, int64_t tokens) {
  const QueryStrides strides = check_tokens(name, t, q, s, tokens);
  return {const_cast<char*>(static_cast<const char*>(t.const_data_ptr())), strides, dtype_of(name, t)};
}

}  // namespace relpos
