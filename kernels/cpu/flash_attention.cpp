#include "kernels/cpu/flash_attention.hpp"

#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/tiled_attention.hpp"

namespace ditattn::kernels::cpu {
namespace {

const TileKernel& kernel_for(const AttentionProblem& problem, CpuUnits units) {
  // The largest product is the largest logit only where the scale is positive.
  const bool dot = units.bf16_dot && problem.type == ElementType::bfloat16 && problem.scale > 0;
  const LevelKernels& kernels = kernels_of(units.level);
  return dot ? *kernels.flash_bf16_dot : *kernels.flash_f32;
}

}  // namespace

CpuUnits choose_units(CpuLevel level, bool always) {
  const LevelKernels& kernels = kernels_of(level);
  if (kernels.flash_bf16_dot == nullptr) return {.level = level};
  const bool faster = always || kernels.flash_bf16_dot->multiply_rate() > 1.2 * kernels.flash_f32->multiply_rate();
  return {.level = level, .bf16_dot = faster};
}

void flash_attention(const AttentionProblem& problem, const Executor& executor, CpuUnits units) {
  tiled_attention(problem, executor, kernel_for(problem, units));
}

}  // namespace ditattn::kernels::cpu
