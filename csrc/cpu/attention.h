// attention.h - what the forward and the backward of the attention share: operands, tiles of queries, work memory.
//
//   a task       (group, tile of queries): the lines and columns of factors.h, or some of the class tokens
//   a strip      at most kStrip queries of a tile, transposed: one query per lane
//   a block      neighbouring keys, all or at most kBlockKeys; image rows may begin and end within it
//   an element   E, what products multiply: a number, or a pair of bfloat16 (pair_kernels.h); C is what sums are in
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

template <typename E>
struct Attention : Problem<E> {
  using typename Problem<E>::C;
  using Problem<E>::kPairs, Problem<E>::pairs;

  C scale;
  Rows k, v;
  const AttentionKernels<C>& steps = attention_kernels<C>();

  static int64_t room(int64_t numbers) { return kPairs ? elements<E>(numbers) : 0; }
  // Operands [count, D] of a strip, along, to [D, kStrip]: one query per lane, and across.
  void transpose(E* to, const E* rows, int64_t count) const {
    const int64_t columns = elements<E>(this->shape.D);
    if constexpr (kPairs)
      pairs->transpose(to, kStrip, rows, this->e_padded(), count, columns);
    else
      steps.transpose(to, kStrip, rows, this->e_padded(), count, columns, C{1});
  }
  // Operands [rows, ld] that are along, across: themselves, or the pairs of two rows each, in this room.
  const E* across(const E* along, int64_t ld, int64_t rows, int64_t numbers, const Buffer<E>& room) const {
    if constexpr (kPairs) {
      for (int64_t i = 0; i < rows; i += 2)
        pairs->pack_rows(nullptr, room.get() + i * ld, 0, along + i * ld, i + 1 < rows ? along + (i + 1) * ld : nullptr,
                         numbers);
      return room.get();
    } else {
      return along;
    }
  }
  // Operands [rows, D padded] that are along, as numbers: themselves, or widened in this room.
  const C* numbers(const E* along, int64_t rows, C* room) const {
    if constexpr (kPairs) {
      for (int64_t i = 0; i < rows; ++i)
        this->run.load(room + i * this->d_padded, along + i * this->e_padded(), this->q_dtype, this->shape.D);
      return room;
    } else {
      return along;
    }
  }
  // Where operands made of these numbers are.
  E* place(const Buffer<C>& numbers, const Buffer<E>& room) const {
    if constexpr (kPairs)
      return room.get();
    else
      return numbers.get();
  }
  const BlockKernels<E>& block() const {
    if constexpr (kPairs)
      return pairs->block;
    else
      return steps.block;
  }

  // Rows [tokens of one group, D padded] of k, v and their like.
  void store_tokens(const Rows& to, int64_t group, int64_t count, const C* from) const {
    for (int64_t i = 0; i < count; ++i)
      this->run.store(to.at(this->shape, group, i), from + i * this->d_padded, to.dtype, this->shape.D);
  }
};

// k or v of one group, [tokens, D padded], as operands of products.
template <typename E>
class Keys {
 public:
  enum Use { kAlong = 1, kAcross = 2 };

  Keys(const Attention<E>& p, int use)
      : along_(!kPairs || use & kAlong ? p.shape.N() * p.e_padded() : 0),
        across_(kPairs && use & kAcross ? elements<E>(p.shape.N()) * p.d_padded : 0),
        use_(use) {}
  const E* along(const Attention<E>& p, int64_t first) const { return along_.get() + first * p.e_padded(); }
  const E* across(const Attention<E>& p, int64_t first) const {
    return (kPairs ? across_ : along_).get() + first / kNumbers<E> * p.d_padded;
  }
  void load(const Attention<E>& p, const Rows& from, int64_t group) const {
    const int64_t tokens = p.shape.N();
    const auto row = [&](int64_t i) { return from.at(p.shape, group, i); };
    const Asking ask = p.asking(from.strides, from.dtype, group);
    if constexpr (!kPairs) {
      p.load_rows(along_.get(), tokens, from.dtype, ask, row);
    } else {
      p.for_each_row(tokens, ask, row, [&](int64_t i, const void* last) {
        if (i % 2 == 0 && i + 1 < tokens) return;  // with the next one
        const int64_t first = i / 2 * 2, at = first * p.e_padded();
        p.pairs->pack_rows(use_ & kAlong ? along_.get() + at : nullptr, use_ & kAcross ? across_.get() + at : nullptr,
                           p.d_padded, row(first), first < i ? last : nullptr, p.shape.D);
      });
    }
  }

 private:
  static constexpr bool kPairs = kNumbers<E> == 2;
  Buffer<E> along_, across_;
  int use_;
};

// ---- tasks
struct QueryTile {
  Tile grid;  // where `biased`
  int64_t group, count;
  int64_t first = 0;  // token, where not
  bool biased = true;

  template <typename E>
  int64_t token(const Attention<E>& p, int64_t i) const {
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

// Blocks of keys: one where possible, else as few as the limit allows and as equal as possible. Whole pairs of keys.
struct KeyBlocks {
  int64_t keys, count, size;
  explicit KeyBlocks(int64_t n)
      : keys(n), count(n <= kWholeKeys ? 1 : ceil_div(n, kBlockKeys)), size(2 * ceil_div(n, 2 * count)) {}
  int64_t length(int64_t first) const { return std::min(size, keys - first); }
};

// ---- work memory of one thread
template <typename E>
struct AttentionScratch {
  using C = Sum<E>;
  Scratch<E> tile;              // q rows and factors of a tile
  Keys<E> k, v;                 // of one group
  Buffer<E> q;                  // of a strip: [D, kStrip]
  Buffer<C> outer, inner, h_t;  // its factors, [.., kStrip]; h_t only beside a t axis
  Buffer<C> scores;             // [block, kStrip]
  Buffer<E> score_pairs;        // the same as operands, where those are pairs
  int64_t loaded = -1;          // the group that k and v hold

  AttentionScratch(const Attention<E>& p, int64_t queries, int use_of_k, int use_of_v)
      : tile(p, queries),
        k(p, use_of_k),
        v(p, use_of_v),
        q(p.e_padded() * kStrip),
        outer(p.shape.outer_keys() * kStrip),
        inner(p.shape.axis[kW].keys * kStrip),
        h_t(p.shape.axis[kT].rows ? (p.shape.axis[kT].keys + p.shape.axis[kH].keys) * kStrip : 0),
        scores(KeyBlocks(p.shape.N()).size * kStrip),
        score_pairs(p.room(KeyBlocks(p.shape.N()).size * kStrip)) {}

  void load_group(const Attention<E>& p, int64_t group) {
    if (loaded == group) return;
    k.load(p, p.k, group);
    v.load(p, p.v, group);
    loaded = group;
  }
};

template <typename E>
void load_tile(const Attention<E>& p, const QueryTile& tile, const AxisRows<E>* axes, const AttentionScratch<E>& mine) {
  p.load_operands(mine.tile.q.get(), tile.count, p.q_dtype, p.asking(p.strides, p.q_dtype, tile.group),
                  [&](int64_t i) { return p.q_row(tile.group, tile.token(p, i)); });
  if (tile.biased) compute_factors(p, tile.grid, axes, mine.tile);
}

// Queries first .. first + count of a tile, and their factors, one query per lane.
template <typename E, typename C = Sum<E>>
void load_strip(const Attention<E>& p, const QueryTile& tile, int64_t first, int64_t count,
                const AttentionScratch<E>& mine) {
  const Shape& s = p.shape;
  const int64_t keys_t = s.axis[kT].keys, keys_h = s.axis[kH].keys, keys_w = s.axis[kW].keys;
  C *outer = mine.outer.get(), *inner = mine.inner.get();
  p.transpose(mine.q.get(), mine.tile.q.get() + first * p.e_padded(), count);
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

// The product <q, k> of a strip and the keys first .. first + keys.
template <typename E, typename C = Sum<E>>
Gemm<E> score_product(const Attention<E>& p, int64_t first, int64_t keys, int64_t queries,
                      const AttentionScratch<E>& mine) {
  return {keys,
          padded<C>(queries),
          elements<E>(p.shape.D),
          mine.k.along(p, first),
          p.e_padded(),
          1,
          mine.q.get(),
          kStrip,
          mine.scores.get(),
          kStrip,
          false};
}

template <typename E, typename C = Sum<E>>
ScoreBlock<C> score_block(const Attention<E>& p, int64_t first, int64_t keys, int64_t queries,
                          const AttentionScratch<E>& mine) {
  ScoreBlock<C> block;
  block.scores = mine.scores.get();
  block.outer = mine.outer.get();
  block.inner = mine.inner.get();
  block.prefix = std::clamp<int64_t>(p.shape.prefix - first, 0, keys);
  block.first = std::max<int64_t>(first - p.shape.prefix, 0);
  block.keys = keys;
  block.columns = p.shape.axis[kW].keys;
  block.queries = queries;
  block.scale = p.scale;
  block.whole = keys == p.shape.N();
  return block;
}

}  // namespace relpos
