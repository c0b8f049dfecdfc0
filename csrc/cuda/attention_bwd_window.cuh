// attention_bwd_window.cuh - all gradients of a window in one pass: its keys stay, its queries pass, what
// attention_bwd_queries.cuh and attention_bwd_keys.cuh compute twice is computed once.
//
//                 keys: two lines per warp stay
//                +------+------+------+ .. +
//   queries      |  ds  |      |      |    |     dk, dv: each warp of its lines, down the columns, in registers
//   of a pass,   +------+------+------+ .. +     dq, factor gradients: each warp of its 16 queries, along the rows
//   16 per warp  |      |      |      |    |
//                +------+------+------+ .. +
//
//   grid     (groups), a block each: as many warps as its pairs of lines. A line is padded to 16 slots.
//   thread   keys: as attention_bwd_keys.cuh; queries: as attention_bwd_queries.cuh.
//   shared   k and v, and the table where it is small and there is room; q, grad, factors and ds of a pass. Line
//            gradients take the place of the line factors.
//   barriers two per pass: all strips are there; ds is complete. In the first, one more: the table is there.
//
// ds is rounded to half precision on its way through shared memory, as an operand of products always is. Its sums over
// the keys of a line or column are products with zeros and ones, in float32.
#pragma once
#include "attention_bwd_keys.cuh"
#include "tile/whole_tables.cuh"

namespace relpos {

// What is the same for the whole block: in shared memory, for in registers it would be in the way of the products.
struct WindowState {
  BlockPlace passes[kWindowPasses];
  int done[kWindowWarps];  // passes, of each warp

  __device__ __forceinline__ void fill(const AttentionBwdParams& p) {
    const int M = static_cast<int>(p.shape.M());
    for (int i = 0; i < kWindowWarps; ++i) done[i] = 0;
    for (int i = 0; i < kWindowPasses; ++i) {
      find_place(p, M, passes[i]);
      passes[i].first = i * p.block_rows;
      passes[i].count = min(p.block_rows, M - passes[i].first);
    }
  }
};
static_assert(sizeof(WindowState) <= kWindowStateBytes);

// The token of a slot, or -1.
__device__ __forceinline__ int window_token(const Shape& s, int slot) {
  const int line = slot / kWindowLine, column = slot % kWindowLine, keys_w = s.axis[kW].keys;
  return line < s.outer_keys() && column < keys_w ? line * keys_w + column : -1;
}

// The factors of a warp's lines, as attention_bwd_keys.cuh asks for them.
struct WindowLines {
  int first, queries;

  __device__ __forceinline__ bool has_bias(int, int) const { return true; }
  __device__ __forceinline__ int column(int, int half) const { return half * 8; }
  __device__ __forceinline__ int line(int s, int) const { return (first + s) * queries; }
};

// The tiles of the block; those of queries are of one pass.
template <typename T, int D>
struct WindowTiles : QueryTile<T, D> {
  Tile<T, D> k, v, table;
  T* ds;  // [slots, queries]
  int ds_ld;
  Coordinates* rows;
  float* stages;  // a warp's own, one behind another

  __device__ __forceinline__ WindowTiles(unsigned char* shared, const AttentionBwdWindowShared& at) {
    this->q.data = reinterpret_cast<T*>(shared + at.q);
    this->grad.data = reinterpret_cast<T*>(shared + at.grad);
    this->columns = reinterpret_cast<__half*>(shared + at.columns);
    this->column_ld = kWindowColumnLd;
    this->lines = reinterpret_cast<float*>(shared + at.lines);
    this->statistics = reinterpret_cast<float*>(shared + at.delta);
    k.data = reinterpret_cast<T*>(shared + at.k), v.data = reinterpret_cast<T*>(shared + at.v);
    table.data = reinterpret_cast<T*>(shared + at.table);
    stages = reinterpret_cast<float*>(shared + at.stage);
    ds = reinterpret_cast<T*>(shared + at.ds), ds_ld = at.ds_ld;
    rows = reinterpret_cast<Coordinates*>(shared + at.rows);
  }

  // As the products of keys from `slot` on and queries from `m` on lie in registers.
  template <int STRIPS, int BLOCKS>
  __device__ __forceinline__ void put_ds(int slot, int m, const float (&x)[STRIPS][BLOCKS][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < STRIPS; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j)
          set_pair(ds + (slot + s * 16 + half * 8 + lane / 4) * ds_ld + m + j * 8 + lane % 4 * 2, x[s][j][2 * half],
                   x[s][j][2 * half + 1]);
  }
};

// By all threads.
template <typename T, int D>
__device__ __forceinline__ void copy_window_keys(const Tile<T, D>& to, const AttentionParams& p,
                                                 const BlockPlace& place, const InRows& from) {
  const T* data = rows_of<T>(place, from);
  copy_rows(to, 2 * p.block_rows, p.shape.D, threadIdx.x, blockDim.x, data, [&](int slot) {
    const int n = window_token(p.shape, slot);
    return n >= 0 ? data + n * from.row : nullptr;
  });
}

// A warp's strip of 16 queries. WHOLE: the table is in shared memory.
template <typename T, int D, bool WHOLE>
struct WindowStrip {
  static constexpr int kStageLd = kWindowLine + kInnerPad, kBlocks = D <= 64 ? 4 : 2;  // dk and dv leave no more
  const AttentionBwdParams& p;
  const BlockPlace& place;  // of the pass
  const WindowTiles<T, D> tiles;
  int first;  // of the queries of the pass

  __device__ __forceinline__ float* stage() const { return tiles.stages + first * p.at_window.staged; }

  __device__ __forceinline__ void copy(const Tile<T, D>& to, const InRows& from) const {
    copy_strip(to, first, p, place, from);
    cp_async_commit();
  }

  // Starts copies of q, and of grad unless its place is the stage.
  __device__ __forceinline__ void ask() const {
    copy(tiles.q, p.q);
    if constexpr (WHOLE) copy(tiles.grad, p.grad);
  }
  __device__ __forceinline__ void prefetch() const {
    prefetch_strip<T>(first, p, place, p.q);
    prefetch_strip<T>(first, p, place, p.grad);
    prefetch_strip<T>(first, p, place, p.out);
  }
  // Coordinates, factors and delta; and grad, if it is to come yet.
  template <typename F>
  __device__ __forceinline__ void fill(F&& until_q_is_there) const {
    const int lane = threadIdx.x % 32, row = first + lane % 16, part = lane / 16;
    if (lane < 16) tiles.rows[row] = locate_query(p, place, row);
    const float delta = find_delta<T, D, D <= 64 ? 4 : 2>(p, place, first);
    if (lane % 2 == 0) tiles.statistics[first + lane / 2] = delta;
    until_q_is_there();
    const float lse = row < place.count ? p.lse[place.group * p.shape.M() + place.first + row] : INFINITY;
    if constexpr (WHOLE)
      fill_whole(row, part, lse);
    else
      fill_any(row, part, lse);
  }

  __device__ __forceinline__ void fill_any(int row, int part, float lse) const {
    const float offset = (fill_columns(row, part) - lse) * kLog2e;
    __syncwarp();  // the stage may be overwritten
    strip_lines<false, kBlocks>(p, tiles.rows, tiles.q, first, stage(),
                                [&](int line, float x) { tiles.lines[line * p.block_rows + row] = x + offset; });
    __syncwarp();  // grad may arrive
    copy(tiles.grad, p.grad);
  }

  // Factors of a table that is here.
  __device__ __forceinline__ void fill_whole(int row, int part, float lse) const {
    constexpr int kCount = kWindowLine / 2;
    const StripRows<Tile<T, D>, 0> queries(tiles.q, first);
    const Coordinates* rows = tiles.rows + first;
    const Axis &h = p.shape.axis[kH], &w = p.shape.axis[kW];
    put_products(p, kW, queries, tiles.table, 1.f, stage());
    const float* of_key = stage() + place_of_first_key(p, kW, rows, row - first);
    float x[kCount], largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = part * kCount + i;
      x[i] = key < w.keys ? of_key[-(key << w.k_shift)] : -INFINITY;
      largest = fmaxf(largest, x[i]);
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 16));
    __syncwarp();  // all are read: they may be overwritten
#pragma unroll
    for (int i = 0; i < kCount; i += 2)
      set_pair(tiles.columns + row * kWindowColumnLd + part * kCount + i, (x[i] - largest) * p.inverse_scale,
               (x[i + 1] - largest) * p.inverse_scale);
    const float offset = (largest - lse) * kLog2e;
    put_products(p, kH, queries, tiles.table, kLog2e, stage());
    const float* of_line = stage() + place_of_first_key(p, kH, rows, row - first);
#pragma unroll
    for (int i = 0; i < kMostWindowLines / 2; ++i) {
      const int line = 2 * i + part;
      if (line < h.keys) tiles.lines[line * p.block_rows + row] = of_line[-(line << h.k_shift)] + offset;
    }
  }

  // Relative to the largest of the query, which is returned, for half precision to be exact enough.
  __device__ __forceinline__ float fill_columns(int row, int part) const {
    const int keys_w = p.shape.axis[kW].keys;
    float* of_row = stage() + (row - first) * kStageLd;
    strip_factors<kBlocks>(p, kW, {0, keys_w}, tiles.rows, tiles.q, first,
                           [&](int, int to, int key, float x) { stage()[to * kStageLd + key] = x; });
    __syncwarp();
    const bool exists = row < place.count;
    float largest = -INFINITY;
    for (int i = part; exists && i < keys_w; i += 2) largest = fmaxf(largest, of_row[i]);
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 16));
    for (int i = part; i < kWindowLine; i += 2) {
      const float x = exists ? (of_row[i] - largest) * p.inverse_scale : 0.f;
      tiles.columns[row * kWindowColumnLd + i] = __float2half_rn(i < keys_w ? x : -INFINITY);
    }
    return largest;
  }

  // dq and the factor gradients, from ds. The strip's rows of q and grad are free again.
  __device__ __forceinline__ void take() const {
    float dq[1][D / 8][4] = {};
    if constexpr (WHOLE) {  // factor gradients of a query lie in the stage as in memory
      const int factors = p.shape.factors();
      sum_factors(dq, stage(), 1, factors, stage() + p.shape.axis[kH].keys, factors);
      end_whole(dq, factors);
    } else {
      sum_factors(dq, tiles.lines + first, p.block_rows, 1, stage(), kStageLd);
      end(dq);
    }
    if (p.dq.data == nullptr) return;
    put_strip(tiles.q, first, dq[0], p.scale);
    store_queries(tiles.q, first, p, place, p.dq);
  }
  __device__ __forceinline__ void end_whole(float (&dq)[1][D / 8][4], int factors) const {
    if (p.dfactors) {
      float* to = p.dfactors + (place.group * p.shape.M() + place.first + first) * factors;
      const int count = min(16, place.count - first) * factors;
#pragma unroll 4
      for (int i = threadIdx.x % 32; i < count; i += 32) to[i] = stage()[i];
    }
#pragma unroll 1
    for (int a = kH; a <= kW; ++a)
      add_whole_table(p, a, tiles.rows + afresh(first), tiles.table, stage() + p.shape.axis[a].factor, factors, dq);
  }
  __device__ __forceinline__ void end(float (&dq)[1][D / 8][4]) const {
    const Tile<T, D> table_rows{tiles.q.at(first, 0)};
    const float* columns = stage();
    const auto of_column = [columns](int row, int key) { return columns[row * kStageLd + key]; };
    const int keys_w = p.shape.axis[kW].keys;
    if (p.dfactors) write_factors(p, place, first, kW, 0, keys_w, of_column);
    constexpr bool kAhead = D <= 64;
    add_table_products<kAhead>(p, kW, {0, keys_w}, tiles.rows, first, table_rows, dq, of_column);
    end_lines<kAhead>(p, place, tiles.rows, first, {tiles.lines, p.block_rows}, stage(), table_rows, dq);
    __syncwarp();  // the table rows may be overwritten
  }

  // dq, and the factor gradients: of line i and query m to lines[i * of_line + m * of_query], of column j to
  // columns[m * column_ld + j].
  __device__ __forceinline__ void sum_factors(float (&dq)[1][D / 8][4], float* lines, int of_line, int of_query,
                                              float* columns, int column_ld) const {
    const int lane = static_cast<int>(afresh(threadIdx.x % 32)), g = lane / 4, t = lane % 4;
    const uint32_t diagonal = pair_of(g == 2 * t, g == 2 * t + 1);
    const OperandB<T> all{{pair_of(1.f, 1.f), pair_of(1.f, 1.f)}}, left{{diagonal, 0u}}, right{{0u, diagonal}};
    float dcolumn[2][4] = {};
    Tile<T, D> k = tiles.k;
    const T* of_keys = tiles.ds;
    lines += g * of_query;
#pragma unroll 1
    for (int line = 0; line < p.shape.outer_keys(); ++line) {
      OperandA<T> ds;
      load_transposed(ds, of_keys, tiles.ds_ld, 0, first);
      float dline[4] = {};
      multiply(dline, ds, all);
      multiply(dcolumn[0], ds, left);
      multiply(dcolumn[1], ds, right);
#pragma unroll
      for (int d = 0; d < D / 8; d += 2) {
        OperandB<T> keys[2];
        load_straight(keys, k, 0, d);
        multiply(dq[0][d], ds, keys[0]);
        multiply(dq[0][d + 1], ds, keys[1]);
      }
      if (t == 0) lines[0] = dline[0], lines[8 * of_query] = dline[2];
      lines += of_line;
      k.data += kWindowLine * k.kLd, of_keys += kWindowLine * tiles.ds_ld;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = j * 8 + 2 * t + e % 2;
        if (key < p.shape.axis[kW].keys) columns[(g + e / 2 * 8) * column_ld + key] = dcolumn[j][e];
      }
    __syncwarp();  // all are there
  }

  __device__ __forceinline__ static uint32_t pair_of(float x, float y) {
    uint32_t pair;
    set_pair(reinterpret_cast<T*>(&pair), x, y);
    return pair;
  }
};

template <typename T, int D, bool WHOLE>
__global__ void __launch_bounds__(kMostAttentionThreads, 1) attention_bwd_window_kernel(const AttentionBwdParams p) {
  constexpr int kPart = 2;
  RELPOS_DYNAMIC_SHARED(shared);
  WindowState& state = *reinterpret_cast<WindowState*>(shared);
  if (threadIdx.x == 0) state.fill(p);
  __syncthreads();
  const int warp = threadIdx.x / 32;
  const auto strip = [&](const BlockPlace& pass) {
    return WindowStrip<T, D, WHOLE>{p, pass, {shared, p.at_window}, static_cast<int>(afresh(warp * 16))};
  };
  if constexpr (WHOLE) copy_table(WindowTiles<T, D>(shared, p.at_window).table, p.at_window.table_rows, p);
  strip(state.passes[0]).ask();
  strip(state.passes[1]).prefetch();
  copy_window_keys(WindowTiles<T, D>(shared, p.at_window).k, p, state.passes[0], p.k);
  copy_window_keys(WindowTiles<T, D>(shared, p.at_window).v, p, state.passes[0], p.v);
  cp_async_commit();

  AttentionBwdKeys<T, D, kWindowWarpLines, kPart> mine(p, warp * kWindowWarpLines * kWindowLine);
#pragma unroll 1
  for (int& done = state.done[warp]; done * p.block_rows < p.shape.M();) {
    const BlockPlace& pass = state.passes[done];
    if (done > 0) strip(pass).ask();
    strip(pass).fill([&] {
      if (done > 0) {
        cp_async_wait<0>();
        __syncwarp();
      } else {
        cp_async_wait<1>();
        __syncthreads();  // the table is there
      }
    });
    cp_async_wait<0>();
    __syncthreads();  // all strips are there, and the last pass is done with
    {
      const WindowTiles<T, D> tiles(shared, p.at_window);
      const WindowLines lines{warp * kWindowWarpLines, p.block_rows};
      for (int begin = 0; begin < pass.count; begin += 8 * kPart)
        mine.absorb(lines, tiles, begin, tiles.k, tiles.v, 0,
                    [&](const auto& ds) { tiles.put_ds(mine.first, begin, ds); });
    }
    __syncthreads();  // ds is complete
    strip(pass).take();
    if (threadIdx.x % 32 == 0) ++done;
    __syncwarp();  // the strip is done with
  }
  const Tile<T, D> own = WindowTiles<T, D>(shared, p.at_window).v;
  const auto token = [&](int slot) { return window_token(p.shape, slot); };
  store_slots(p, p.dk, mine.dk, p.scale, own, mine.first, state.passes[0], token);
  store_slots(p, p.dv, mine.dv, 1.f, own, mine.first, state.passes[0], token);
}

}  // namespace relpos
