#include "kernels/cpu/flash_attention.hpp"

#include "kernels/cpu/tiled_attention.hpp"

namespace ditattn::kernels::cpu {
namespace {

const TileKernel& f32_kernel(CpuLevel level) {
  if (level >= CpuLevel::avx512) return kFlashAvx512;
  return level == CpuLevel::avx2 ? kFlashAvx2 : kFlashSse2;
}

const TileKernel& kernel_for(const AttentionProblem& problem, CpuUnits units) {
  // The largest product is the largest logit only where the scale is positive.
  const bool dot = units.bf16_dot && problem.type == ElementType::bfloat16 && problem.scale > 0;
  return dot ? kFlashAvx512Bf16 : f32_kernel(units.level);
}

}  // namespace

CpuUnits choose_units(CpuLevel level, bool always) {
  if (level < CpuLevel::avx512_bf16) return {.level = level};
  const bool faster = always || kFlashAvx512Bf16.multiply_rate() > 1.2 * kFlashAvx512.multiply_rate();
  return {.level = level, .bf16_dot = faster};
}

void flash_attention(const AttentionProblem& problem, const Executor& executor, CpuUnits units) {
  tiled_attention(problem, executor, kernel_for(problem, units));
}

}  // namespace ditattn::kernels::cpu
