#pragma once

/// Which keys quantized kernels look at. For units without flags of their own.

#include <algorithm>
#include <vector>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu {

/// Per batch entry, the keys that some row sees, masks and lengths aside; empty: all. What is outside must not move the
/// scales of what is inside.
inline std::vector<std::int64_t> find_seen(const AttentionProblem& problem) {
  std::vector<std::int64_t> seen;
  if (problem.ranges == nullptr && !problem.causal) return seen;
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    std::int64_t begin = problem.keys;
    std::int64_t end = 0;
    if (problem.ranges == nullptr) begin = 0, end = problem.rows + problem.causal_offset;
    for (std::int64_t row = 0; row < problem.rows && problem.ranges != nullptr; ++row) {
      const std::int64_t* range = problem.ranges + b * problem.range_batch_stride + 2 * row;
      if (range[0] >= range[1]) continue;
      begin = std::min(begin, range[0]);
      end = std::max(end, range[1]);
    }
    seen.push_back(begin);
    seen.push_back(end);
  }
  return seen;
}

}  // namespace ditattn::kernels::cpu
