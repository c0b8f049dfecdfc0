// tokens.cuh - the queries of an attention block and its tiles of keys, on their way into shared memory.
#pragma once
#include "../../params.h"
#include "products.cuh"

namespace relpos {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <typename T>
using Factor = std::conditional_t<sizeof(T) == 2, __half, float>;  // bfloat16 would lose three bits

// By one thread.
__device__ __forceinline__ void find_place(const AttentionParams& p, int tokens, BlockPlace& block) {
  int tile;
  block.group = p.by_tiles.divide(static_cast<int>(blockIdx.x), tile);
  block.batch = p.by_heads.divide(block.group, block.head);
  block.first = tile * p.block_rows;
  block.count = min(p.block_rows, tokens - block.first);
}

// Token 0 of the block's group.
template <typename T>
__device__ __forceinline__ const T* rows_of(const BlockPlace& block, const InRows& rows) {
  return static_cast<const T*>(rows.data) + block.batch * rows.batch + block.head * rows.head;
}
template <typename T>
__device__ __forceinline__ T* rows_of(const BlockPlace& block, const OutRows& rows) {
  return static_cast<T*>(rows.data) + block.batch * rows.batch + block.head * rows.head;
}

// Coordinates of query i of the block; -1 for class tokens, and where there is no query.
__device__ __forceinline__ Coordinates locate_query(const AttentionParams& p, const BlockPlace& block, int i) {
  Coordinates found;
  p.grid.locate(i < block.count ? block.first + i - p.shape.prefix : -1, found.of);
  return found;
}
__device__ __forceinline__ void locate_queries(const AttentionParams& p, const BlockPlace& block, int block_rows,
                                               Coordinates* rows) {
  for (int i = threadIdx.x; i < block_rows; i += blockDim.x) rows[i] = locate_query(p, block, i);
}

// Starts the copy of a row by a pair of threads, 32 bytes at a time; zeros if it does not exist.
template <typename T, int D>
__device__ __forceinline__ void copy_row(const Tile<T, D>& to, int row, int width, const T* from, bool exists) {
  const int begin = static_cast<int>(afresh(threadIdx.x % 2 * Tile<T, D>::kChunk)), left = exists ? width - begin : 0;
#pragma unroll
  for (int d = 0; d < D; d += 2 * Tile<T, D>::kChunk) cp_async_16(to.at(row, begin) + d, from + begin + d, d < left);
}

// Starts copies of `rows` rows into a tile by `threads` threads, of which this is number `thread`, even or odd as
// threadIdx.x is. from(row) is where it lies, or null for zeros; `some` is any valid address.
template <typename T, int D, typename F>
__device__ __forceinline__ void copy_rows(const Tile<T, D>& to, int rows, int width, int thread, int threads,
                                          const T* some, F&& from) {
  for (int row = thread / 2; row < rows; row += threads / 2) {
    const T* found = from(row);
    copy_row(to, row, width, found ? found : some, found != nullptr);
  }
}

// The same at once, in parts.
template <int D, typename F>
__device__ __forceinline__ void copy_rows(const SplitTile<D>& to, int rows, int width, int thread, int threads,
                                          const float*, F&& from) {
#pragma unroll 4
  for (int i = thread; i < rows * (D / 4); i += threads) {
    const int row = i / (D / 4), d = i % (D / 4) * 4;
    const float* found = from(row);
    const bool exists = found != nullptr && d < width;
    to.set(row, d, exists ? *reinterpret_cast<const float4*>(found + d) : make_float4(0.f, 0.f, 0.f, 0.f));
  }
}

// Tokens first .. first + rows - 1 of the block's group, zeros from `count` on.
template <typename Rows>
__device__ __forceinline__ void copy_tokens(const Rows& to, int rows, const AttentionParams& p, const BlockPlace& block,
                                            const InRows& from, int first, int count) {
  const auto* group = rows_of<typename Rows::Element>(block, from);
  copy_rows(to, rows, p.shape.D, threadIdx.x, blockDim.x, group,
            [&](int row) { return row < count ? group + (first + row) * from.row : nullptr; });
}

// The same by a warp, for its strip: queries `strip` .. of the block, into the rows of that number.
template <typename T, int D>
__device__ __forceinline__ void copy_strip(const Tile<T, D>& to, int strip, const AttentionParams& p,
                                           const BlockPlace& block, const InRows& from) {
  const T* group = rows_of<T>(block, from);
  copy_rows(Tile<T, D>{to.at(strip, 0)}, 16, p.shape.D, threadIdx.x % 32, 32, group, [&](int row) {
    return strip + row < block.count ? group + (block.first + strip + row) * from.row : nullptr;
  });
}

// Has what a warp's strip will copy brought to L2, while nothing else can be done; the first 256 bytes of a row.
template <typename T>
__device__ __forceinline__ void prefetch_strip(int strip, const AttentionParams& p, const BlockPlace& block,
                                               const InRows& from) {
  constexpr int kLine = 128 / sizeof(T);
  const int lane = static_cast<int>(afresh(threadIdx.x % 32)), row = strip + lane % 16, d = lane / 16 * kLine;
  if (row < block.count && d < p.shape.D) prefetch_l2(rows_of<T>(block, from) + (block.first + row) * from.row + d);
}

// By all threads.
template <int D>
__device__ __forceinline__ void split_tile(const SplitTile<D>& to, int rows, const Tile<float, D>& from) {
#pragma unroll 2
  for (int i = threadIdx.x; i < rows * (D / 4); i += blockDim.x) {
    const int row = i / (D / 4), d = i % (D / 4) * 4;
    to.set(row, d, *reinterpret_cast<const float4*>(from.at(row, d)));
  }
}

// Stores a warp's `rows` rows of a tile, as far as tokens exist, to out(row) (null: there is none), 16 bytes at a time.
template <typename T, int D, typename F>
__device__ __forceinline__ void store_rows(const Tile<T, D>& from, int first, int rows, int width, F&& out) {
  const int part = static_cast<int>(afresh(threadIdx.x % 2));
  for (int row = threadIdx.x % 32 / 2; row < rows; row += 16) {
    T* to = out(first + row);
    if (to == nullptr) continue;
#pragma unroll
    for (int i = 0; i < Tile<T, D>::kChunks / 2; ++i) {
      const int chunk = 2 * i + part, d = chunk * Tile<T, D>::kChunk;
      if (d < width)
        *reinterpret_cast<uint4*>(to + d) = *reinterpret_cast<const uint4*>(from.chunk(first + row, chunk));
    }
  }
}

// Stores a warp's strip of 16 queries of the block, as far as they exist.
template <typename T, int D>
__device__ __forceinline__ void store_queries(const Tile<T, D>& from, int first, const AttentionParams& p,
                                              const BlockPlace& block, const OutRows& to) {
  T* group = rows_of<T>(block, to);
  store_rows(from, first, 16, p.shape.D,
             [&](int m) { return m < block.count ? group + (block.first + m) * to.row : nullptr; });
}

// The lane's share of a strip of results, times `factor`, into rows `first` .. of a tile; for the whole warp to read.
template <typename T, int D>
__device__ __forceinline__ void put_strip(const Tile<T, D>& to, int first, const float (&x)[D / 8][4], float factor) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int d = 0; d < D / 8; ++d)
      set_pair(to.at(first + lane / 4 + half * 8, d * 8 + lane % 4 * 2), x[d][2 * half] * factor,
               x[d][2 * half + 1] * factor);
  __syncwarp();
}

// Where results of a strip may lie when its queries are no longer needed: a tile, of which it has rows `first` and on.
template <typename T, int D>
__device__ __forceinline__ Tile<T, D> in_place_of(const Tile<T, D>& queries, int) {
  return queries;
}
template <int D>
__device__ __forceinline__ Tile<float, D> in_place_of(const SplitTile<D>& queries, int first) {
  __syncwarp();  // the last operands have been read
  return {reinterpret_cast<float*>(queries.part(0).at(first, 0)) - first * Tile<float, D>::kLd};
}

// ---- keys

// The first column of block j, counted from that of the span.
__device__ __forceinline__ int column_of(const KeyTiling& keys, const Span& span, int j) {
  return span.of_lines ? keys.column_of[j] : 8 * j;
}

// Number i of the spans: those of the lines; before them, from -class_tiles on, those of class tokens.
__device__ __forceinline__ Span span_of(const AttentionParams& p, int i) {
  const bool of_lines = i >= 0;
  const int all = of_lines ? p.shape.axis[kW].keys : p.shape.prefix;
  const int each = of_lines ? p.keys.columns : p.keys.keys();
  const int first = (of_lines ? i : i + p.keys.class_tiles) * each, columns = min(each, all - first);
  return {of_lines, i, first, columns, of_lines ? p.keys.tiles : 1, of_lines ? 0 : p.keys.padded_lines};
}

// The same and where its rows are, by all threads; known to all after a barrier.
template <typename T>
__device__ __forceinline__ void find_span(const AttentionParams& p, const BlockPlace& block, int i, SpanRows& rows) {
  const Span span = span_of(p, i);
  if (threadIdx.x == 0) {
    static_cast<Span&>(rows) = span;
    rows.k = rows_of<T>(block, p.k);
    rows.v = rows_of<T>(block, p.v);
  }
  for (int row = threadIdx.x; row < p.keys.keys(); row += blockDim.x) {
    const int j = row / 8, column = column_of(p.keys, span, j) + row % 8;
    const int line = span.of_lines ? p.keys.line_of[j] : 0;
    rows.token[row] = (span.of_lines ? p.shape.prefix + line * p.shape.axis[kW].keys : 0) + span.first + column;
    rows.line[row] = static_cast<int8_t>(column < span.columns ? line : -1);
  }
}
// work(begin) for PART blocks of a tile at a time, by the warp of queries `first` and on: as far as there are queries
// and the blocks have keys. Large grids, of one line per tile, hardly have tiles without.
template <int BLOCKS, int PART, bool ONE_LINE, typename F>
__device__ __forceinline__ void for_each_part(const AttentionParams& p, const BlockPlace& block, int first,
                                              const Span& span, int tile, F&& work) {
  if (!ONE_LINE && first >= block.count) return;
  const int lines = min(p.keys.lines, p.shape.outer_keys() - tile * p.keys.lines);
  const int blocks = span.of_lines ? lines * p.keys.columns / 8 : ceil_div(span.columns, 8);
#pragma unroll
  for (int begin = 0; begin < BLOCKS; begin += PART) {
    if (!ONE_LINE && begin >= blocks) break;
    work(begin);
  }
}

// Tile number `tile` of a span, of BLOCKS blocks: k and v.
template <int BLOCKS, typename T, int D>
__device__ __forceinline__ void copy_keys(const Tile<T, D>& k, const Tile<T, D>& v, const AttentionParams& p,
                                          const SpanRows& span, int tile) {
  const int lines = tile * p.keys.lines, tokens = lines * p.shape.axis[kW].keys;
  for (int row = threadIdx.x / 2; row < BLOCKS * 8; row += blockDim.x / 2) {
    const int line = span.line[row];
    const bool exists = line >= 0 && line + lines < p.shape.outer_keys();
    const int64_t token = exists ? span.token[row] + tokens : 0;
    copy_row(k, row, p.shape.D, static_cast<const T*>(span.k) + token * p.k.row, exists);
    copy_row(v, row, p.shape.D, static_cast<const T*>(span.v) + token * p.v.row, exists);
  }
}

// The tiles of a span pass through two stages: while one is worked on, the next is on its way. The second stage of
// float32 has the parts of what has arrived in the first.
template <typename T, int D, int BLOCKS>
struct KeyStages {
  static constexpr bool kSplit = sizeof(T) == 4;
  static constexpr int kRows = BLOCKS * 8, kTile = kRows * Tile<T, D>::kLd;
  T* data;

  __device__ __forceinline__ Tile<T, D> arriving(int tile, int which) const {
    return {data + (kSplit ? which : tile % kKeyStages * 2 + which) * kTile};
  }
  __device__ __forceinline__ ProductTile<T, D> get(int tile, int which) const {
    if constexpr (kSplit)
      return {reinterpret_cast<__nv_bfloat16*>(data + 2 * kTile) + which * kRows * SplitTile<D>::kLd};
    else
      return arriving(tile, which);
  }
  __device__ __forceinline__ void split_keys(int tile) const {
    for (int which = 0; which < 2; ++which) split_tile(get(tile, which), kRows, arriving(tile, which));
  }
  // For every span: begin(span) while the stages are free, work(tile, k, v) for every tile, end(span) when they are
  // free again; all by all threads. `span` is in shared memory.
  template <typename Begin, typename Work, typename End>
  __device__ __forceinline__ void for_each_tile(const AttentionParams& p, const BlockPlace& block, SpanRows& span,
                                                Begin&& begin, Work&& work, End&& end) const {
    int next = -p.keys.class_tiles;
    do {
      __syncthreads();  // nobody needs the last span any more
      find_span<T>(p, block, next, span);
      __syncthreads();  // it is known
      begin(span);
      const int tiles = span.tiles;
      for (int tile = -1; tile < tiles; ++tile) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and the one before is done with
        if constexpr (kSplit) {
          if (tile >= 0) split_keys(tile);
          __syncthreads();  // its parts are there, and it may be overwritten
        }
        if (tile + 1 < tiles) copy_keys<BLOCKS>(arriving(tile + 1, 0), arriving(tile + 1, 1), p, span, tile + 1);
        cp_async_commit();
        if (tile >= 0) work(tile, get(tile, 0), get(tile, 1));
      }
      __syncthreads();  // the last is done with
      end(span);
      next = span.number + 1;  // a counter would take a register
    } while (next < p.keys.spans);
  }
};

}  // namespace relpos
