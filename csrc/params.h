// params.h - what a kernel is given: one struct per kernel, filled field by field by the launcher.
#pragma once
#include "plan.h"
#include "shared_attention.h"

namespace relpos {

// Division of a non-negative int below 2^31 by a constant that is known on the host only.
struct FastDiv {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDiv() = default;
  explicit FastDiv(int d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  RELPOS_HD int divide(int n) const {
    const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier;
    return static_cast<int>((static_cast<uint32_t>(product >> 32) + static_cast<uint32_t>(n)) >> shift);
  }
  RELPOS_HD int divide(int n, int& remainder) const {
    const int quotient = divide(n);
    remainder = n - quotient * static_cast<int>(divisor);
    return quotient;
  }
};

// Where queries lie on their grid.
struct QueryGrid {
  FastDiv by_w, by_h;

  QueryGrid() = default;
  explicit QueryGrid(const Shape& s) : by_w(s.axis[kW].queries), by_h(s.axis[kH].queries) {}
  // Of a query, counted without class tokens; -1 below 0.
  RELPOS_HD void locate(int token, int (&coordinate)[kAxes]) const {
    coordinate[kT] = coordinate[kH] = coordinate[kW] = -1;
    if (token >= 0) coordinate[kT] = by_h.divide(by_w.divide(token, coordinate[kW]), coordinate[kH]);
  }
};

template <typename Data>
struct TokenRows {  // [batch, heads, tokens, D], strides in elements
  Data data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};
using InRows = TokenRows<const void*>;
using OutRows = TokenRows<void*>;

struct LogitsParams {
  Shape shape;
  InRows q;
  const void* table = nullptr;     // [table rows, D], dtype of q
  const int32_t* index = nullptr;  // csrc/shapes.h
  QueryGrid grid;
  FastDiv by_m, by_heads, by_q_vectors;  // the last: of 16 bytes in a row of q in shared memory
  int block_rows = 0, factor_ld = 0, q_ld = 0;
  bool whole_vectors = false;       // logits may be read and written 16 bytes at a time
  bool whole_vectors_of_q = false;  // the same of q
  int line_lanes_log2 = -1;         // lanes that load one image row of keys, if a lane always meets the same columns
};

struct LogitsFwdParams : LogitsParams {
  const void* logits = nullptr;  // [rows, N]; may be `out`
  void* out = nullptr;
  FastDiv by_n, by_keys_w, by_keys_h;
  FastDiv by_strips, by_runs;  // strips of queries in a block; runs of vectors in a row of whole lines
  bool in_two_lines = false;   // 16 bytes of logits lie in two image rows of keys at most; there are no class tokens
};

struct LogitsBwdParams : LogitsParams {
  const void* grad = nullptr;  // [rows, N]
  void* dq = nullptr;          // [rows, D] or null
  float* dfactors = nullptr;   // [rows, factors] or null
  FastDiv by_quads;            // of elements in a row of dq
  FastDiv by_vectors;          // of 16 bytes in a row of the table
};

struct TableGradParams {
  Shape shape;
  InRows q;
  const int32_t* index = nullptr;
  const float* dfactors = nullptr;  // [rows, factors]
  float* partials = nullptr;        // [splits, pairs, D]
  float* dtable = nullptr;          // [table rows, D]
  int64_t pairs = 0;                // of a query and a key coordinate, all axes
  int splits = 0;
  bool whole_vectors_of_q = false;  // which may be read 16 bytes at a time
  FastDiv by_heads, by_splits;
  int columns = 0;               // of D that a block takes
  FastDiv by_tiles, by_d_tiles;  // tiles of keys and of D of a query coordinate; of D alone
  struct {
    FastDiv by_per_group, by_inner;  // queries of a group with the same coordinate; queries per step of it
    int64_t per_split = 0;           // queries with the same coordinate that a block sums
  } of_axis[kAxes];
};

struct AttentionParams {
  Shape shape;
  InRows q, k, v;
  const void* table = nullptr;     // [table rows, D], dtype of q
  const int32_t* index = nullptr;  // csrc/shapes.h
  QueryGrid grid;
  KeyTiling keys;
  int block_rows = 0;  // queries of a block
  float scale = 1.f, inverse_scale = 1.f;
  float to_powers = 1.f, from_powers = 1.f;  // between products of q and k and powers of two
  FastDiv by_tiles;                          // blocks of a group
  FastDiv by_heads;
};

struct AttentionFwdParams : AttentionParams {
  AttentionFwdShared at;  // each kernel has its own
  AttentionFwdWindowShared at_window;
  AttentionFwdSm90Shared at_sm90;
  OutRows out;
  float* lse = nullptr;  // [groups, M] or null
};

struct AttentionBwdParams : AttentionParams {
  AttentionBwdQueriesShared at_queries;  // each kernel has its own
  AttentionBwdQueriesSm90Shared at_queries_sm90;
  AttentionBwdKeysShared at_keys;
  AttentionBwdKeysSm90Shared at_keys_sm90;
  AttentionBwdWindowShared at_window;
  InRows grad, out;
  const float* lse = nullptr;  // [groups, M]
  OutRows dq, dk, dv;          // data may be null
  float* dfactors = nullptr;   // [rows, factors] or null
  void* columns = nullptr;     // shared_attention.h; null where neither dk nor dv is wanted
  float* lines = nullptr;
};

}  // namespace relpos
