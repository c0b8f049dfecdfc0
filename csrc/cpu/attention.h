// attention.h - what the forward and the backward of the attention share: operands, tiles of queries, work memory.
//
//   a task       (group, tile of queries): the lines and columns of factors.h, or some of the class tokens
//   a strip      at most kStrip queries of a tile, transposed: one query per lane
//   a block      neighbouring keys, all or at most kBlockKeys; image rows may begin and end within it
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>

#include "attention_kernels.h"
#include "factors.h"

namespace relpos {

constexpr int64_t kBlockKeys = 256;  // a block of scores is 64 KiB of float32: in L2 with all that is around it
constexpr int64_t kWholeKeys = 640;  // up to here all keys are one block, still in L2: nothing is rescaled, and the
                                     // backward normalises as the forward did, which lse alone cannot to the last bit

template <typename C>
const AttentionKernels<C>& attention_kernels() {
  if constexpr (sizeof(C) == 8)
    return RELPOS_CHOOSE(kAttentionDouble);
  else
    return RELPOS_CHOOSE(kAttentionFloat);
}

// Rows of a tensor [B, heads, S, D] or [G, S, D], any strides but the last.
struct Rows {
  char* data = nullptr;
  QueryStrides strides;
  Dtype dtype = Dtype::kFloat32;

  char* at(const Shape& s, int64_t group, int64_t token) const {
    return data + row_offset(s, strides, group, token) * bytes_of(dtype);
  }
};

// Tensor `name` must be like q but for its number of tokens.
Rows rows_like(const char* name, const Tensor& t, const Tensor& q, const Shape& s, int64_t tokens);

template <typename C>
struct Attention : Problem<C> {
  C scale;
  Rows k, v;
  const AttentionKernels<C>& steps = attention_kernels<C>();

  // Rows [tokens of one group, D padded] of k, v and their like.
  void load_rows(const Rows& from, int64_t group, int64_t first, int64_t count, C* to) const {
    for (int64_t i = 0; i < count; ++i)
      this->run.load(to + i * this->d_padded, from.at(this->shape, group, first + i), from.dtype, this->shape.D);
  }
  void store_rows(const Rows& to, int64_t group, int64_t count, const C* from) const {
    for (int64_t i = 0; i < count; ++i)
      this->run.store(to.at(this->shape, group, i), from + i * this->d_padded, to.dtype, this->shape.D);
  }
};

// ---- tasks
struct QueryTile {
  Tile grid;  // where `biased`
  int64_t group, count;
  int64_t first = 0;  // token, where not
  bool biased = true;

  template <typename C>
  int64_t token(const Attention<C>& p, int64_t i) const {
    return biased ? p.query(grid, i) : first + i;
  }
};

class QueryTiles {
 public:
  explicit QueryTiles(const Shape& s)
      : tiling_(s),
        prefix_(s.prefix),
        grid_tiles_(tiling_.count() / s.groups),
        class_tiles_(ceil_div(prefix_, kStrip)) {}
  int64_t per_group() const { return class_tiles_ + grid_tiles_; }
  int64_t max_queries() const { return std::max(tiling_.max_queries(), std::min(prefix_, kStrip)); }
  QueryTile get(int64_t group, int64_t i) const {
    if (i < class_tiles_) return {{}, group, std::min(kStrip, prefix_ - i * kStrip), i * kStrip, false};
    const Tile t = tiling_[group * grid_tiles_ + i - class_tiles_];
    return {t, group, t.queries()};
  }

 private:
  Tiling tiling_;
  int64_t prefix_, grid_tiles_, class_tiles_;
};

// Blocks of keys: one where possible, else as few as the limit allows and as even as possible.
struct KeyBlocks {
  int64_t keys, count, size;
  explicit KeyBlocks(int64_t n)
      : keys(n), count(n <= kWholeKeys ? 1 : ceil_div(n, kBlockKeys)), size(ceil_div(n, count)) {}
  int64_t length(int64_t first) const { return std::min(size, keys - first); }
};

// ---- work memory of one thread
template <typename C>
struct AttentionScratch {
  Scratch<C> tile;                 // q rows and factors of a tile
  Buffer<C> k, v;                  // [keys, D padded] of one group
  Buffer<C> q, outer, inner, h_t;  // of a strip: [D, kStrip], factors [.., kStrip]; h_t only beside a t axis
  Buffer<C> scores;                // [block, kStrip]
  int64_t loaded = -1;             // the group that k and v hold

  AttentionScratch(const Attention<C>& p, int64_t queries)
      : tile(p, queries),
        k(p.shape.N() * p.d_padded),
        v(p.shape.N() * p.d_padded),
        q(p.d_padded * kStrip),
        outer(p.shape.outer_keys() * kStrip),
        inner(p.shape.axis[kW].keys * kStrip),
        h_t(p.shape.axis[kT].rows ? (p.shape.axis[kT].keys + p.shape.axis[kH].keys) * kStrip : 0),
        scores(KeyBlocks(p.shape.N()).size * kStrip) {}

  void load_group(const Attention<C>& p, int64_t group) {
    if (loaded == group) return;
    p.load_rows(p.k, group, 0, p.shape.N(), k.get());
    p.load_rows(p.v, group, 0, p.shape.N(), v.get());
    loaded = group;
  }
};

template <typename C>
void load_tile(const Attention<C>& p, const QueryTile& tile, const AxisRows<C>* axes, const AttentionScratch<C>& mine) {
  for (int64_t i = 0; i < tile.count; ++i)
    p.run.load(mine.tile.q.get() + i * p.d_padded, p.q_row(tile.group, tile.token(p, i)), p.q_dtype, p.shape.D);
  if (tile.biased) compute_factors(p, tile.grid, axes, mine.tile);
}

// Queries first .. first + count of a tile, and their factors, one query per lane.
template <typename C>
void load_strip(const Attention<C>& p, const QueryTile& tile, int64_t first, int64_t count,
                const AttentionScratch<C>& mine) {
  const Shape& s = p.shape;
  const int64_t keys_t = s.axis[kT].keys, keys_h = s.axis[kH].keys, keys_w = s.axis[kW].keys;
  C *outer = mine.outer.get(), *inner = mine.inner.get();
  p.steps.transpose(mine.q.get(), kStrip, mine.tile.q.get() + first * p.d_padded, p.d_padded, count, s.D, C{1});
  if (!tile.biased) {
    std::fill(outer, outer + s.outer_keys() * kStrip, C{});
    std::fill(inner, inner + keys_w * kStrip, C{});
    return;
  }
  p.steps.transpose(inner, kStrip, mine.tile.w.get() + first * p.w_ld, p.w_ld, count, keys_w, C{1});
  const bool has_t = s.axis[kT].rows != 0;
  C *t = mine.h_t.get(), *h = has_t ? t + keys_t * kStrip : outer;
  p.steps.transpose(h, kStrip, mine.tile.h.get() + first * p.h_ld, p.h_ld, count, keys_h, C{1});
  if (!has_t) return;
  p.steps.transpose(t, kStrip, mine.tile.t.get() + first * p.t_ld, p.t_ld, count, keys_t, C{1});
  for (int64_t o = 0; o < keys_t * keys_h; ++o)
    for (int64_t i = 0; i < kStrip; ++i)
      outer[o * kStrip + i] = t[o / keys_h * kStrip + i] + h[o % keys_h * kStrip + i];
}

// The scores <q, k> of a strip and the keys first .. first + keys.
template <typename C>
ScoreBlock<C> score_block(const Attention<C>& p, int64_t first, int64_t keys, int64_t lanes,
                          const AttentionScratch<C>& mine) {
  const int64_t prefix = std::clamp<int64_t>(p.shape.prefix - first, 0, keys);
  p.run.gemm({keys, lanes, p.shape.D, mine.k.get() + first * p.d_padded, p.d_padded, 1, mine.q.get(), kStrip,
              mine.scores.get(), kStrip, false});
  ScoreBlock<C> block;
  block.scores = mine.scores.get();
  block.outer = mine.outer.get();
  block.inner = mine.inner.get();
  block.prefix = prefix;
  block.first = std::max<int64_t>(first - p.shape.prefix, 0);
  block.keys = keys;
  block.columns = p.shape.axis[kW].keys;
  block.lanes = lanes;
  block.scale = p.scale;
  block.whole = keys == p.shape.N();
  return block;
}

}  // namespace relpos
