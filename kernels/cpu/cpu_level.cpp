#include "kernels/cpu/cpu_level.hpp"

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

}  // namespace ditattn::kernels::cpu
