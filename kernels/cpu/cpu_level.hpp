#pragma once

namespace ditattn::kernels::cpu {

/// Instruction sets the kernels are built for, lowest first.
enum class CpuLevel : int { sse2, avx2, avx512 };

inline constexpr const char* kCpuLevelNames[] = {"sse2", "avx2", "avx512"};

/// The highest level this CPU and operating system can run.
CpuLevel detect_cpu_level();

}  // namespace ditattn::kernels::cpu
