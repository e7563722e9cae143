// Microscaled FP4 attention: finds the means, and chooses a kernel.

#include "kernels/cpu/sage3_attention.hpp"

#include <algorithm>
#include <vector>

#include "kernels/cpu/in_order.hpp"
#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/seen_keys.hpp"
#include "kernels/cpu/tiled_attention.hpp"

namespace ditattn::kernels::cpu {
void sage3_attention(const AttentionProblem& problem, const Executor& executor, CpuUnits units,
                     Sage3Smoothing smoothing) {
  const LevelKernels& kernels = kernels_of(units.level);
  sage3_attention(problem, executor, units.bf16_dot ? *kernels.sage3_bf16_dot : *kernels.sage3, smoothing);
}

void sage3_attention(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel,
                     Sage3Smoothing smoothing) {
  const std::int64_t heads = problem.batch * problem.kv_heads;
  if (heads == 0 || problem.heads == 0) return;
  const std::vector<std::int64_t> seen = find_seen(problem);
  const std::int64_t pitch = (problem.head_size + 15) / 16 * 16;
  const std::int64_t floats = (2 + problem.heads / problem.kv_heads) * pitch;
  std::vector<float> means(static_cast<std::size_t>(heads * floats));
  AttentionProblem with_means = problem;
  with_means.seen = seen.empty() ? nullptr : seen.data();
  with_means.means = means.data();
  in_order(executor, std::min<std::int64_t>(executor.threads, heads), heads, [&](std::int64_t, std::int64_t head) {
    kernel.find_means(with_means, head, smoothing, means.data() + head * floats);
  });
  tiled_attention(with_means, executor, kernel);
}

}  // namespace ditattn::kernels::cpu
