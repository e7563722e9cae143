#pragma once

namespace ditattn::kernels::cpu {

/// Instruction sets the kernels are built for, lowest first; the first is what every CPU of the architecture has.
#if defined(__aarch64__)
enum class CpuLevel : int { neon };
inline constexpr const char* kCpuLevelNames[] = {"neon"};
#else
enum class CpuLevel : int { sse2, avx2, avx512, avx512_vnni, avx512_bf16, amx };
inline constexpr const char* kCpuLevelNames[] = {"sse2", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
#endif

/// The highest level this CPU and operating system can run. Where that is AMX, Linux is asked to let this process use
/// it, which it does from then on.
CpuLevel detect_cpu_level();

}  // namespace ditattn::kernels::cpu
