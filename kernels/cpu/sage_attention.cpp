#include "kernels/cpu/sage_attention.hpp"

#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/tiled_attention.hpp"

namespace ditattn::kernels::cpu {

void sage_attention(const AttentionProblem& problem, const Executor& executor, CpuLevel level, SageOptions options) {
  const LevelKernels& kernels = kernels_of(level);
  tiled_attention(problem, executor, options.wide_values ? *kernels.sage_wide : *kernels.sage);
}

}  // namespace ditattn::kernels::cpu
