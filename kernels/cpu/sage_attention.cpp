#include "kernels/cpu/sage_attention.hpp"

#include <algorithm>
#include <vector>

#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/tiled_attention.hpp"

namespace ditattn::kernels::cpu {

namespace {

// Per batch entry, the keys that some row sees, masks and lengths aside; empty: all. What is outside must not move the
// scales of what is inside.
std::vector<std::int64_t> find_seen(const AttentionProblem& problem) {
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

}  // namespace

void sage_attention(const AttentionProblem& problem, const Executor& executor, CpuLevel level, SageOptions options) {
  const LevelKernels& kernels = kernels_of(level);
  sage_attention(problem, executor, options.wide_values ? *kernels.sage_wide : *kernels.sage);
}

void sage_attention(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel) {
  const std::vector<std::int64_t> seen = find_seen(problem);
  AttentionProblem with_seen = problem;
  with_seen.seen = seen.empty() ? nullptr : seen.data();
  tiled_attention(with_seen, executor, kernel);
}

}  // namespace ditattn::kernels::cpu
