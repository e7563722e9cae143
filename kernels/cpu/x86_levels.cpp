#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/tile.hpp"

namespace ditattn::kernels::cpu {

CpuLevel detect_cpu_level() {
  // The built-in checks XGETBV too: whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    // Every CPU with AVX512-BF16 has VNNI.
    if (__builtin_cpu_supports("avx512bf16")) return CpuLevel::avx512_bf16;
    return __builtin_cpu_supports("avx512vnni") ? CpuLevel::avx512_vnni : CpuLevel::avx512;
  }
  return avx2 ? CpuLevel::avx2 : CpuLevel::sse2;  // every CPU with AVX2 has F16C
}

const LevelKernels& kernels_of(CpuLevel level) {
  static constexpr LevelKernels kernels[] = {
      {&kFlashSse2, nullptr, &kSageSse2, &kSageWideSse2},
      {&kFlashAvx2, nullptr, &kSageAvx2, &kSageWideAvx2},
      {&kFlashAvx512, nullptr, &kSageAvx512, &kSageWideAvx512},
      {&kFlashAvx512, nullptr, &kSageAvx512Vnni, &kSageWideAvx512Vnni},
      {&kFlashAvx512, &kFlashAvx512Bf16, &kSageAvx512Vnni, &kSageWideAvx512Vnni},
  };
  return kernels[static_cast<int>(level)];
}

}  // namespace ditattn::kernels::cpu
