#pragma once

namespace ditattn::kernels::cpu {

/// Instruction sets the kernels are built for, lowest first.
enum class CpuLevel : int { sse2, avx2, avx512, avx512_bf16 };

inline constexpr const char* kCpuLevelNames[] = {"sse2", "avx2", "avx512", "avx512_bf16"};

/// The highest level this CPU and operating system can run.
CpuLevel detect_cpu_level();

}  // namespace ditattn::kernels::cpu
