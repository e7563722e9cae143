#include "kernels/cpu/sage_attention.hpp"

#include <vector>

#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/seen_keys.hpp"
#include "kernels/cpu/tiled_attention.hpp"

namespace ditattn::kernels::cpu {

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
