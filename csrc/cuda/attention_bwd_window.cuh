// attention_bwd_window.cuh - all gradients of a window in one pass: its keys stay, its queries pass, what
// attention_bwd_queries.cuh and attention_bwd_keys.cuh compute twice is computed once.
//
//                 keys: a warp's 32 stay
//                +-----+-----+-----+ .. +
//   queries      | ds  |     |     |    |     dk, dv: each warp of its 32 keys, down the columns, in registers
//   of a pass,   +-----+-----+-----+ .. +     dq, factor gradients: each warp of its 16 queries, along the rows
//   16 per warp  |     |     |     |    |
//                +-----+-----+-----+ .. +
//
//   grid     (groups), a block each: as many warps as the slots of its keys need.
//   thread   keys: as attention_bwd_keys.cuh; queries: as attention_bwd_queries.cuh.
//   shared   k and v; q, grad, factors and ds of a pass. Line gradients take the place of the line factors.
//   barriers two per pass: all strips are there; ds is complete.
//
// ds is rounded to half precision on its way through shared memory, as an operand of products always is. Its sums over
// the keys of a line or column are products with zeros and ones, in float32.
#pragma once
#include "attention_bwd_keys.cuh"
#include "tile/factor_gradients.cuh"

namespace relpos {

static_assert(sizeof(SlotBlock) <= kSlotBlockBytes);

// A warp's strip of 16 queries.
template <typename T, int D>
struct WindowStrip {
  static constexpr int kStageLd = kMostWindowLine + kInnerPad;
  const AttentionBwdParams& p;
  const BlockPlace& place;  // of the pass
  const KeySlots& slots;
  const QueryTile<T, D> tile;
  Coordinates* rows;
  int first;  // of the queries of the pass

  __device__ __forceinline__ float* stage() const { return reinterpret_cast<float*>(tile.grad.at(first, 0)); }

  __device__ __forceinline__ void copy(const Tile<T, D>& to, const InRows& from) const {
    const T* group = rows_of<T>(place, from);
    const Tile<T, D> own{to.at(first, 0)};
    copy_rows(own, 16, p.shape.D, threadIdx.x % 32, 32, group, [&](int row) {
      return first + row < place.count ? group + (place.first + first + row) * from.row : nullptr;
    });
    cp_async_commit();
  }

  // q, grad, coordinates, factors and delta. grad comes last: before, its place is the stage.
  __device__ __forceinline__ void fill() const {
    const int lane = threadIdx.x % 32, row = first + lane % 16, part = lane / 16;
    copy(tile.q, p.q);
    if (lane < 16) rows[row] = locate_query(p.shape, place, row);
    const float delta = find_delta<T>(p, place, first);
    if (lane % 2 == 0) tile.statistics[first + lane / 2] = delta;
    cp_async_wait<0>();
    __syncwarp();
    const float offset = fill_columns(row, part);
    __syncwarp();  // the stage may be overwritten
    if (slots.prefix_lines && part == 0) tile.lines[row] = offset_of_class(row);
    float* lines = tile.lines + slots.prefix_lines * p.block_rows;
    strip_lines<false>(p, rows, tile.q, first, p.shape.outer_keys(), stage(),
                       [&](int line, float x) { lines[line * p.block_rows + row] = x + offset; });
    __syncwarp();  // grad may arrive
    copy(tile.grad, p.grad);
  }

  // What exponents begin with, in powers of two: -inf where there is no query.
  __device__ __forceinline__ float offset_of_class(int row) const {
    const float lse = row < place.count ? p.lse[place.group * p.shape.M() + place.first + row] : INFINITY;
    return -lse * kLog2e;
  }

  // Relative to the largest of the query, which the lines get: half precision is exact enough there. Returns what
  // the exponents of lines begin with.
  __device__ __forceinline__ float fill_columns(int row, int part) const {
    const int keys_w = p.shape.axis[kW].keys;
    float* of_row = stage() + (row - first) * kStageLd;
    strip_factors<T>(p, kW, {0, keys_w}, rows, tile.q, first,
                     [&](int, int to, int key, float x) { stage()[to * kStageLd + key] = x; });
    __syncwarp();
    const bool biased = rows[row].of[kW] >= 0;
    float most = -INFINITY;
    for (int i = part; biased && i < keys_w; i += 2) most = fmaxf(most, of_row[i]);
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
    const float largest = biased ? most : 0.f;
    for (int i = part; i < slots.line; i += 2) {
      const float x = biased && i < keys_w ? (of_row[i] - largest) * p.inverse_scale : 0.f;
      tile.columns[row * tile.column_ld + i] = __float2half_rn(i < keys_w ? x : -INFINITY);
    }
    return offset_of_class(row) + largest * kLog2e;
  }

  // ds [slots, queries of the pass]. The strip's rows of q and grad are free again.
  __device__ __forceinline__ void take(const Tile<T, D>& k, const T* ds, int ds_ld) const {
    float* own_lines = tile.lines + slots.prefix_lines * p.block_rows;
    const LineGradients dlines{own_lines, p.block_rows};
    for (int i = threadIdx.x % 32; i < p.shape.outer_keys() * 16; i += 32) dlines.at(i / 16, first + i % 16) = 0.f;
    __syncwarp();
    float dq[1][D / 8][4] = {}, dcolumn[2][4] = {};
    add_keys(k, ds, ds_ld, dlines, dq, dcolumn);
    put_columns(dcolumn);
    __syncwarp();  // they are there, and those of lines
    const Tile<T, D> table_rows{tile.q.at(first, 0)};
    const float* columns = stage();
    const auto of_column = [columns](int row, int key) { return columns[row * kStageLd + key]; };
    const int keys_w = p.shape.axis[kW].keys;
    if (p.dfactors) write_factors(p, place, first, kW, 0, keys_w, of_column);
    add_table_products(p, kW, {0, keys_w}, rows, first, table_rows, dq, of_column);
    end_lines(p, place, rows, first, dlines, table_rows, dq);
    if (p.dq.data) {
      __syncwarp();  // the table rows may be overwritten
      put_strip(tile.q, first, dq[0], p.scale);
      store_queries(tile.q, first, p, place, p.dq);
    }
    __syncwarp();  // the next pass may come
  }

  __device__ __forceinline__ void add_keys(const Tile<T, D>& k, const T* ds, int ds_ld, const LineGradients& dlines,
                                           float (&dq)[1][D / 8][4], float (&dcolumn)[2][4]) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, count = static_cast<int>(slots.count(p.shape));
    const int line_blocks = slots.line / 8;
    const uint32_t ones = pair_of(1.f, 1.f), diagonal = pair_of(g == 2 * t, g == 2 * t + 1);
    OperandB<T> each_block;  // even columns: the first 8 keys; odd columns: the others
    each_block.pairs[0] = g % 2 ? 0u : ones, each_block.pairs[1] = g % 2 ? ones : 0u;
    int line = 0, block_of_line = 0;  // of the block of 8 keys, once past the class tokens
#pragma unroll 1
    for (int slot = 0; slot < count; slot += 16) {
      OperandA<T> part;
      load_transposed(part, ds, ds_ld, slot, first);
#pragma unroll
      for (int d = 0; d < D / 8; d += 2) {
        OperandB<T> columns[2];
        load_straight(columns, k, slot, d);
        multiply(dq[0][d], part, columns[0]);
        multiply(dq[0][d + 1], part, columns[1]);
      }
      float sums[4] = {};
      multiply(sums, part, each_block);
      OperandB<T> to_left, to_right;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool of_line = slot + j * 8 >= slots.prefix && slot + j * 8 < count;
        to_left.pairs[j] = of_line && !block_of_line ? diagonal : 0u;
        to_right.pairs[j] = of_line && block_of_line ? diagonal : 0u;
        if (!of_line) continue;
        if (t == 0) dlines.at(line, first + g) += sums[j], dlines.at(line, first + g + 8) += sums[2 + j];
        if (++block_of_line == line_blocks) block_of_line = 0, ++line;
      }
      multiply(dcolumn[0], part, to_left);
      multiply(dcolumn[1], part, to_right);
    }
  }

  __device__ __forceinline__ static uint32_t pair_of(float x, float y) {
    uint32_t pair;
    set_pair(reinterpret_cast<T*>(&pair), x, y);
    return pair;
  }

  __device__ __forceinline__ void put_columns(const float (&dcolumn)[2][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        set_pair(stage() + (lane / 4 + half * 8) * kStageLd + j * 8 + lane % 4 * 2, dcolumn[j][2 * half],
                 dcolumn[j][2 * half + 1]);
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kMostAttentionThreads, 1) attention_bwd_window_kernel(const AttentionBwdParams p) {
  constexpr int kStrips = kWindowSlots / 16, kPart = 2;
  RELPOS_DYNAMIC_SHARED(shared);
  const AttentionBwdWindowShared at = attention_bwd_window_shared(p.shape, p.block_rows, D);
  BlockPlace* places = reinterpret_cast<BlockPlace*>(shared);
  Coordinates* rows = reinterpret_cast<Coordinates*>(shared + at.rows);
  const Tile<T, D> k{reinterpret_cast<T*>(shared + at.k)}, v{reinterpret_cast<T*>(shared + at.v)};
  T* ds = reinterpret_cast<T*>(shared + at.ds);
  const QueryTile<T, D> tile{{reinterpret_cast<T*>(shared + at.q)},
                             {reinterpret_cast<T*>(shared + at.grad)},
                             reinterpret_cast<__half*>(shared + at.columns),
                             at.column_ld,
                             reinterpret_cast<float*>(shared + at.lines),
                             reinterpret_cast<float*>(shared + at.delta)};
  const int warp = threadIdx.x / 32, block_slots = 2 * p.block_rows, M = static_cast<int>(p.shape.M());

  if (threadIdx.x < kWindowPasses) {
    BlockPlace& of_pass = places[threadIdx.x];
    find_place(p, M, of_pass);
    of_pass.first = threadIdx.x * p.block_rows;
    of_pass.count = min(p.block_rows, M - of_pass.first);
  }
  SlotBlock& block = *reinterpret_cast<SlotBlock*>(shared + at.slots);
  if (threadIdx.x == 0) block = SlotBlock(p, 0, block_slots);
  __syncthreads();
  const auto copy = [&](const Tile<T, D>& to, const InRows& from) {
    const T* data = rows_of<T>(places[0], from);
    copy_rows(to, block_slots, p.shape.D, threadIdx.x, blockDim.x, data, [&](int row) {
      const int n = block.token(p.shape, row);
      return n >= 0 ? data + n * from.row : nullptr;
    });
  };
  copy(k, p.k);
  copy(v, p.v);
  cp_async_commit();

  AttentionBwdKeys<T, D, kStrips, kPart> mine(p, warp * kWindowSlots);
#pragma unroll 1
  for (int pass = 0; pass * p.block_rows < M; ++pass) {
    const WindowStrip<T, D> strip{p, places[pass], block.slots, tile, rows, warp * 16};
    strip.fill();
    cp_async_wait<0>();
    __syncthreads();  // all strips are there, and the last pass is done with
    const KeyBlocks<kStrips> blocks(p, block, mine.first, p.block_rows);
    for (int begin = 0; begin < strip.place.count; begin += 8 * kPart)
      mine.absorb(blocks, tile, begin, k, v, 0, [&](const float(&x)[kStrips][kPart][4]) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            T* to = ds + (mine.first + s * 16 + half * 8 + lane / 4) * at.ds_ld + begin + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kPart; ++j) set_pair(to + j * 8, x[s][j][2 * half], x[s][j][2 * half + 1]);
          }
      });
    __syncthreads();  // ds is complete
    if (p.dq.data || p.dfactors) strip.take(k, ds, at.ds_ld);
  }
  mine.store(p.dk, mine.dk, p.scale, v, places[0], block);
  mine.store(p.dv, mine.dv, 1.f, v, places[0], block);
}

}  // namespace relpos
