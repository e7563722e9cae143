#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/tile.hpp"

namespace ditattn::kernels::cpu {

CpuLevel detect_cpu_level() {
  // The built-in checks XGETBV too: whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? CpuLevel::avx512_bf16 : CpuLevel::avx512;
  }
  return avx2 ? CpuLevel::avx2 : CpuLevel::sse2;  // every CPU with AVX2 has F16C
}

const LevelKernels& kernels_of(CpuLevel level) {
  static constexpr LevelKernels kernels[] = {
      {.flash_f32 = &kFlashSse2, .flash_bf16_dot = nullptr},
      {.flash_f32 = &kFlashAvx2, .flash_bf16_dot = nullptr},
      {.flash_f32 = &kFlashAvx512, .flash_bf16_dot = nullptr},
      {.flash_f32 = &kFlashAvx512, .flash_bf16_dot = &kFlashAvx512Bf16},
  };
  return kernels[static_cast<int>(level)];
}

}  // namespace ditattn::kernels::cpu
