// shared_attention.h - where everything of a block lies in shared memory, in bytes: one struct per kernel of the
// attention. The planner asks whether it fits, the launcher hands it to the kernel. Host code, no torch, no CUDA.
#pragma once
#include "plan_attention.h"

namespace relpos {

// Line factors: those of the lines, -inf for those that fill the last tile, and a tile of zeros for class tokens.
RELPOS_HD inline int64_t line_factors(const KeyTiling& tiling) { return tiling.padded_lines + tiling.lines; }

// Byte offsets of a block's shared memory. Before the keys of a span arrive, their place serves the factors. What is
// the same for every problem takes no register: it comes first.
template <int STRIPS>  // of 16 queries per warp, at most
struct KeysPass {
  static constexpr int kMostRows = kMostAttentionThreads / 2 * STRIPS;
  static constexpr int64_t largest = kPlaceBytes + kSpanBytes, rows = largest + kMostRows * 4;
  static constexpr int64_t keys = rows + kMostRows * static_cast<int64_t>(sizeof(Coordinates));
};
// Two stages of keys and values; in float32 one, and their parts.
RELPOS_HD constexpr int64_t key_stages_bytes(int keys, int D, int bytes) {
  const int64_t row = int64_t{tile_ld(D, bytes)} * bytes;
  return 2 * keys * (bytes == 4 ? row + split_ld(D) * 2 : kKeyStages * row);
}
// A row of queries, as products read it.
RELPOS_HD constexpr int64_t product_row_bytes(int D, int bytes) {
  return bytes == 4 ? split_ld(D) * int64_t{2} : tile_ld(D, bytes) * int64_t{bytes};
}
struct AttentionFwdShared : KeysPass<2> {
  int64_t q, lines, total;
};
RELPOS_HD inline AttentionFwdShared attention_fwd_shared(const Shape& s, const KeyTiling& tiling, int block_rows, int D,
                                                         int bytes) {
  const int64_t stages = key_stages_bytes(tiling.keys(), D, bytes);
  const int64_t staged = int64_t{block_rows} / strips_of(bytes, D) * tiling.staged * 4;
  AttentionFwdShared at{};
  at.q = at.keys + (stages > staged ? stages : staged);
  at.lines = at.q + block_rows * product_row_bytes(D, bytes);
  at.total = at.lines + line_factors(tiling) * block_rows * bytes;
  return at;
}

// The forward of windows: half precision, all keys in shared memory, blocks of 8 passing a strip of queries step by
// step.
constexpr int kWindowLine = 16;  // slots at most
constexpr int kWindowBlocks = 4, kFwdWindowPasses = 2;
constexpr int kMostFwdWindowThreads = 512, kFwdWindowThreads = 256;  // two blocks of the latter fit an SM by registers
constexpr int kMostFwdWindowD = 96, kMostWindowKeys = 320;           // registers; where tiles of keys are as good
constexpr int kMostHeldD = 80;                                       // of queries that stay in registers

// Where the table is so small, all of it is in shared memory, and a strip is multiplied with all rows of an axis at
// once: see tile/whole_tables.cuh.
constexpr int kWholeTable = 32, kWholeTableLd = kWholeTable + kInnerPad;  // rows of an axis; floats per query
RELPOS_HD inline bool has_whole_tables(const Shape& s) {
  const Axis &h = s.axis[kH], &w = s.axis[kW];
  const bool small = s.axis[kT].rows == 0 && h.rows <= kWholeTable && w.rows <= kWholeTable;
  return small && s.prefix == 0 && h.k_shift >= 0 && w.k_shift >= 0;
}
RELPOS_HD inline int whole_table_rows(const Shape& s) { return s.axis[kW].first_row + kWholeTable; }

struct AttentionFwdWindowShared {
  static constexpr int64_t rows = round_up<int64_t>(kFwdWindowPasses * sizeof(BlockPlace), 16);
  int64_t q, stage, k, v, table, total;
  int pass_rows, key_rows, table_rows;
  int staged, line_step;  // floats per query; from the factor of one line to that of the next
};
// pass_rows: queries of a pass, 16 per warp
RELPOS_HD inline AttentionFwdWindowShared attention_fwd_window_shared(const Shape& s, const KeyTiling& tiling,
                                                                      int pass_rows, int D, bool whole_tables) {
  const int64_t ld = int64_t{tile_ld(D, 2)} * 2;
  const int of_lines = s.prefix + tiling.padded_lines * s.axis[kW].keys, of_class = tiling.class_tiles * tiling.keys();
  AttentionFwdWindowShared at{};
  at.pass_rows = pass_rows;
  at.key_rows = (of_lines > of_class ? of_lines : of_class) + kWindowLine;  // of which products read 8 or 16 at a time
  at.table_rows = whole_tables ? whole_table_rows(s) : 0;
  at.q = at.rows + pass_rows * static_cast<int64_t>(sizeof(Coordinates));
  // Queries that are in registers leave their place to the factors.
  const bool in_place = whole_tables && D <= kMostHeldD;
  at.stage = in_place ? at.q : at.q + pass_rows * ld;
  at.staged = in_place ? static_cast<int>(ld) / 4 : whole_tables ? kWholeTableLd : tiling.staged;
  at.line_step = whole_tables ? -(1 << s.axis[kH].k_shift) : 16;
  at.k = in_place ? at.q + pass_rows * ld : at.stage + int64_t{pass_rows} * at.staged * 4;
  at.v = at.k + at.key_rows * ld;
  at.table = at.v + at.key_rows * ld;
  at.total = at.table + at.table_rows * ld;
  return at;
}
static_assert(kWholeTableLd * 4 <= tile_ld(64, 2) * 2);

// Kernels for sm_90: two warpgroups with 64 queries each, or slots of keys, that stay, and one that asks for what
// passes; 64 of D to a row of shared memory.
constexpr int kSm90Warps = 8, kSm90Rows = 16 * kSm90Warps;  // that have something that stays
constexpr int kSm90Threads = 32 * (kSm90Warps + 4);
constexpr int kMostStages = 4, kSm90Row = 64;

RELPOS_HD constexpr int64_t sm90_matrix_bytes(int blocks, int D) {  // of so many blocks of 8 rows
  return int64_t{ceil_div(D, kSm90Row)} * blocks * 8 * kSm90Row * 2;
}
struct KeysPassSm90 : KeysPass<1> {
  static constexpr int64_t full = kPlaceBytes, empty = full + 8 * kMostStages, ready = empty + 8 * kMostStages;
  static constexpr int64_t stages = round_up<int64_t>(KeysPass<1>::keys, 1024);
  static_assert(KeysPass<1>::kMostRows == kSm90Rows && ready + 8 <= KeysPass<1>::largest);
  int stage_count;
};
struct AttentionFwdSm90Shared : KeysPassSm90 {
  int64_t q, lines, staged, total;
};
RELPOS_HD inline AttentionFwdSm90Shared attention_fwd_sm90_shared(const KeyTiling& tiling, int D, int stage_count) {
  AttentionFwdSm90Shared at{};
  at.stage_count = stage_count;
  at.q = at.stages + 2 * stage_count * sm90_matrix_bytes(tiling.blocks, D);
  at.lines = at.q + int64_t{kSm90Rows} * tile_ld(D, 2) * 2;
  at.staged = at.lines + round_up<int64_t>(line_factors(tiling) * kSm90Rows * 2, 16);
  at.total = at.staged + int64_t{kSm90Rows} * tiling.staged * 4;
  return at;
}

// Backward, queries stay: dq, the factor gradients, and what the second kernel needs of the factors.
struct AttentionBwdQueriesShared : KeysPass<1> {
  int64_t q, grad, lines, dlines, total;
};
RELPOS_HD inline AttentionBwdQueriesShared attention_bwd_queries_shared(const Shape& s, const KeyTiling& tiling,
                                                                        int block_rows, int D, int bytes) {
  const int64_t ld = int64_t{tile_ld(D, bytes)} * bytes;
  const int64_t stages = key_stages_bytes(tiling.keys(), D, bytes);
  const int64_t staged = block_rows * (int64_t{tiling.staged} * 4 + ld);  // and 16 table rows per warp
  AttentionBwdQueriesShared at{};
  at.q = at.keys + (stages > staged ? stages : staged);
  at.grad = at.q + block_rows * product_row_bytes(D, bytes);
  at.lines = at.grad + block_rows * product_row_bytes(D, bytes);
  at.dlines = at.lines + round_up<int64_t>(line_factors(tiling) * block_rows * bytes, 16);
  at.total = at.dlines + int64_t{tiling.padded_lines} * dlines_ld(block_rows) * 4;
  return at;
}

// The same for sm_90.
struct AttentionBwdQueriesSm90Shared : KeysPassSm90 {
  int64_t q, grad, lines, dlines, total;
};
RELPOS_HD inline AttentionBwdQueriesSm90Shared attention_bwd_queries_sm90_shared(const KeyTiling& tiling, int D,
                                                                                 int stage_count) {
  const int64_t ld = int64_t{tile_ld(D, 2)} * 2;
  const int64_t stages = 2 * stage_count * sm90_matrix_bytes(tiling.blocks, D);
  const int64_t staged = kSm90Rows * (int64_t{tiling.staged} * 4 + ld);  // and 16 table rows per warp
  AttentionBwdQueriesSm90Shared at{};
  at.stage_count = stage_count;
  at.q = at.stages + (stages > staged ? stages : staged);
  at.grad = at.q + kSm90Rows * ld;
  at.lines = at.grad + kSm90Rows * ld;
  at.dlines = at.lines + round_up<int64_t>(line_factors(tiling) * kSm90Rows * 2, 16);
  at.total = at.dlines + int64_t{tiling.padded_lines} * dlines_ld(kSm90Rows) * 4;
  return at;
}

// Backward, keys stay: dk and dv. Its keys stand in slots: class tokens, then every line padded to whole blocks.
struct KeySlots {
  int prefix, line;  // slots of the class tokens, of a line
  int prefix_lines;  // 1 if there are class tokens: they have a line of their own

  RELPOS_HD explicit KeySlots(const Shape& s)
      : prefix(round_up(s.prefix, 8)), line(round_up(s.axis[kW].keys, 8)), prefix_lines(s.prefix > 0) {}
  RELPOS_HD int64_t count(const Shape& s) const { return prefix + int64_t{s.outer_keys()} * line; }
  RELPOS_HD int lines(const Shape& s) const { return prefix_lines + s.outer_keys(); }
};

// What the first kernel leaves for the second.
//   columns [groups, M, slots of a line]     in half precision for half precision q
//   lines   [groups, lines + statistics, queries]     float; behind the lines are the statistics: delta and, for
//                                                     float32, what p is to be multiplied by
RELPOS_HD constexpr int statistics_of(int bytes) { return bytes == 4 ? 2 : 1; }
RELPOS_HD inline int64_t padded_queries(const Shape& s) { return round_up<int64_t>(s.M(), 4); }

// Queries that pass the keys that stay, at a time.
RELPOS_HD constexpr int query_tile(int bytes) { return bytes == 2 ? 64 : 16; }

// A stage begins with what has the same place for every problem; its lines come last. In float32 there is one place
// where q and grad of a tile arrive, and one for their parts: before both stages.
struct QueryStageOffsets {
  int64_t grad, statistics, columns;  // from the begin of a stage; q: 0
  int64_t part_of_q, part_of_grad;    // as grad and q, from the begin of all, as are the stages

  RELPOS_HD constexpr QueryStageOffsets(int D, int bytes)
      : grad(int64_t{query_tile(bytes)} * tile_ld(D, bytes) * bytes),
        statistics(bytes == 2 ? 2 * grad : 0),
        columns(statistics + int64_t{statistics_of(bytes)} * query_tile(bytes) * 4),
        part_of_q(2 * grad),
        part_of_grad(part_of_q + query_tile(bytes) * product_row_bytes(D, bytes)) {}
  RELPOS_HD constexpr int64_t stages(int bytes) const { return bytes == 2 ? 0 : 2 * part_of_grad - part_of_q; }
};
constexpr int64_t kKeysBlockBytes = 128;
// Lines of keys at most that a block of slots has a part of.
RELPOS_HD inline int lines_at_most(const KeySlots& slots, int block_keys) {
  const int lines = block_keys / slots.line + 2 + slots.prefix_lines;
  return lines < block_keys / 8 ? lines : block_keys / 8;
}
struct AttentionBwdKeysShared {
  int64_t k, v, total;
  int lines, bytes_of_stage;  // the former from the begin of a stage
  int column_blocks, column_ld;
};
RELPOS_HD inline AttentionBwdKeysShared attention_bwd_keys_shared(const Shape& s, int block_keys, int D, int bytes) {
  const int64_t keys = block_keys * product_row_bytes(D, bytes);
  const QueryStageOffsets of_stage(D, bytes);
  const KeySlots slots(s);
  AttentionBwdKeysShared at{};
  at.column_blocks = (slots.line < block_keys ? slots.line : block_keys) / 8;
  at.column_ld = 8 * at.column_blocks + (bytes == 2 && at.column_blocks % 2 ? 0 : 16 / bytes);
  const int queries = query_tile(bytes);
  at.lines = static_cast<int>(of_stage.columns) + queries * at.column_ld * bytes;
  at.bytes_of_stage = at.lines + lines_at_most(slots, block_keys) * queries * 4;
  at.k = kKeysBlockBytes + of_stage.stages(bytes) + 2 * int64_t{at.bytes_of_stage};
  at.v = at.k + keys;
  at.total = at.v + keys;
  return at;
}

// The same for sm_90: a stage is of 64 queries, with column factors in one or two matrices of 64 columns.
constexpr int kMostSlotsOfLine = 2 * kSm90Row;
constexpr int64_t kSm90Matrix = sm90_matrix_bytes(8, kSm90Row);  // of 64 rows
struct AttentionBwdKeysSm90Shared {
  static constexpr int64_t full = kKeysBlockBytes, empty = full + 8 * kMostStages, stages = 1024;
  int64_t k, v, total;
  int grad, columns, statistics, lines, bytes_of_stage, filled;  // the last: of its bytes
  int column_matrices, line_count, stage_count;
};
RELPOS_HD inline AttentionBwdKeysSm90Shared attention_bwd_keys_sm90_shared(const Shape& s, int D, int stage_count) {
  constexpr int kRow = query_tile(2) * 4;  // of a number per query
  const int64_t ld = int64_t{tile_ld(D, 2)} * 2;
  const KeySlots slots(s);
  AttentionBwdKeysSm90Shared at{};
  at.stage_count = stage_count;
  at.column_matrices = ceil_div(slots.line, kSm90Row);
  at.line_count = lines_at_most(slots, kSm90Rows);
  at.grad = static_cast<int>(sm90_matrix_bytes(8, D));
  at.columns = 2 * at.grad;
  at.statistics = at.columns + at.column_matrices * static_cast<int>(kSm90Matrix);
  at.lines = at.statistics + kRow;
  at.filled = at.lines + at.line_count * kRow;
  at.bytes_of_stage = round_up(at.filled, 1024);
  at.k = at.stages + int64_t{stage_count} * at.bytes_of_stage;
  at.v = at.k + kSm90Rows * ld;
  at.total = at.v + kSm90Rows * ld;
  return at;
}

// Backward of windows, in one pass: half precision, a block per group with all keys in shared memory, every line
// padded to a strip of 16 slots. A warp has two lines and, of every pass over the queries, one strip of 16.
constexpr int kWindowWarpLines = 2, kWindowPasses = 2;
constexpr int kWindowWarps = kMostAttentionThreads / 32, kMostWindowLines = kWindowWarps * kWindowWarpLines;  // at most
constexpr int kMostWindowD = 80;     // registers
constexpr int kWindowColumnLd = 24;  // elements between the column factors of two queries
constexpr int64_t kWindowStateBytes = 192;

struct AttentionBwdWindowShared {
  int64_t rows, delta, lines, columns, k, v, q, grad, ds, stage, table, total;
  int ds_ld, table_rows, staged;  // table_rows: 0 where the table is not here; staged: floats per query
};
// block_rows: queries of a pass; there are twice as many slots.
RELPOS_HD inline AttentionBwdWindowShared attention_bwd_window_shared(const Shape& s, int block_rows, int D,
                                                                      bool whole_tables) {
  constexpr int kHalf = 2;
  const int64_t rows_bytes = int64_t{block_rows} * tile_ld(D, kHalf) * kHalf;
  AttentionBwdWindowShared at{};
  at.ds_ld = block_rows + 8;  // an odd number of vectors of 16 bytes
  at.rows = kWindowStateBytes;
  at.delta = at.rows + block_rows * static_cast<int64_t>(sizeof(Coordinates));
  at.lines = at.delta + block_rows * 4;
  at.columns = at.lines + int64_t{block_rows} / 16 * kWindowWarpLines * block_rows * 4;
  at.k = at.columns + int64_t{block_rows} * kWindowColumnLd * kHalf;
  at.v = at.k + 2 * rows_bytes;
  at.q = at.v + 2 * rows_bytes;
  at.grad = at.q + rows_bytes;
  at.ds = at.grad + rows_bytes;
  at.table_rows = whole_tables ? whole_table_rows(s) : 0;
  at.staged = whole_tables ? kWholeTableLd : tile_ld(D, kHalf) * kHalf / 4;
  at.table = at.ds + int64_t{2} * block_rows * at.ds_ld * kHalf;
  const int64_t end = at.table + int64_t{at.table_rows} * tile_ld(D, kHalf) * kHalf;
  at.stage = whole_tables ? end : at.grad;  // grad comes after the factors, where there is no room for both
  at.total = whole_tables ? end + int64_t{block_rows} * at.staged * 4 : end;
  return at;
}

}  // namespace relpos
