// sizes.h - the sizes that every kernel can count with, for the ops and for the planner.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "shapes.h"

namespace relpos {

constexpr int64_t kAxisEnd = int64_t{1} << 24;   // a coordinate is exact in float32
constexpr int64_t kCountEnd = int64_t{1} << 31;  // tokens, and entries of the index, are counted by int

inline bool fits(const std::vector<int64_t>& grid, int64_t prefix) {
  int64_t tokens = 1;
  for (const int64_t n : grid) {
    tokens *= n;
    if (tokens >= kCountEnd) return false;  // before the next product could overflow
  }
  return tokens + prefix < kCountEnd;
}

// What is wrong with the sizes of a problem, or nothing.
inline std::string fault_of(const std::vector<int64_t>& q_size, const std::vector<int64_t>& k_size, int64_t head_dim,
                            int64_t prefix) {
  if (q_size.size() != k_size.size() || (q_size.size() != 2 && q_size.size() != 3))
    return "q_size and k_size must both be (h, w) or (t, h, w)";
  if (head_dim < 1 || head_dim >= kAxisEnd) return "the head dimension is out of range: " + std::to_string(head_dim);
  if (prefix < 0 || prefix >= kAxisEnd) return "num_prefix_tokens is out of range: " + std::to_string(prefix);
  const std::pair<const char*, const std::vector<int64_t>&> grids[] = {{"q_size", q_size}, {"k_size", k_size}};
  for (const auto& [name, grid] : grids) {
    for (size_t a = 0; a < grid.size(); ++a)
      if (grid[a] < 1 || grid[a] >= kAxisEnd)
        return std::string(name) + "[" + std::to_string(a) + "] must be at least 1 and less than 2^24, got " +
               std::to_string(grid[a]);
    if (!fits(grid, prefix)) return std::string(name) + " has 2^31 tokens or more";
  }
  return {};
}

}  // namespace relpos
