#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/tile.hpp"

namespace ditattn::kernels::cpu {
namespace {

// GCC 12's __builtin_cpu_supports has no names for AMX.
bool has_amx() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  constexpr unsigned bf16 = 1U << 22;
  constexpr unsigned tile = 1U << 24;
  constexpr unsigned int8 = 1U << 25;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (edx & (bf16 | tile | int8)) == (bf16 | tile | int8);
}

// A signal's stack must hold the registers, 8 KB: so Linux (5.16) gives them only to processes that ask.
bool may_use_amx() {
  constexpr int request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM, which older headers lack
  constexpr int tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

CpuLevel detect_cpu_level() {
  // The built-in checks XGETBV too: whether the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    // Every CPU with AVX512-BF16 has VNNI.
    if (__builtin_cpu_supports("avx512bf16")) {
      return has_amx() && may_use_amx() ? CpuLevel::amx : CpuLevel::avx512_bf16;
    }
    return __builtin_cpu_supports("avx512vnni") ? CpuLevel::avx512_vnni : CpuLevel::avx512;
  }
  return avx2 ? CpuLevel::avx2 : CpuLevel::sse2;  // every CPU with AVX2 has F16C
}

const LevelKernels& kernels_of(CpuLevel level) {
  static constexpr LevelKernels kernels[] = {
      {&kFlashSse2, nullptr, &kSageSse2, &kSageWideSse2, &kSage3Sse2, nullptr},
      {&kFlashAvx2, nullptr, &kSageAvx2, &kSageWideAvx2, &kSage3Avx2, nullptr},
      {&kFlashAvx512, nullptr, &kSageAvx512, &kSageWideAvx512, &kSage3Avx512, nullptr},
      {&kFlashAvx512, nullptr, &kSageAvx512Vnni, &kSageWideAvx512Vnni, &kSage3Avx512, nullptr},
      {&kFlashAvx512, &kFlashAvx512Bf16, &kSageAvx512Vnni, &kSageWideAvx512Vnni, &kSage3Avx512, &kSage3Avx512Bf16},
      {&kFlashAvx512, &kFlashAmx, &kSageAmx, &kSageWideAvx512Vnni, &kSage3Avx512, &kSage3Amx},
  };
  return kernels[static_cast<int>(level)];
}

}  // namespace ditattn::kernels::cpu
