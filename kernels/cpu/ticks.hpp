#pragma once

/// A counter that runs at one rate whatever the core's clock does; local to each unit that includes it.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

[[maybe_unused]] inline std::uint64_t read_ticks() {
#if defined(__aarch64__)
  std::uint64_t count = 0;
  asm volatile("mrs %0, cntvct_el0" : "=r"(count));  // 24 MHz to 1 GHz
  return count;
#else
  return __builtin_ia32_rdtsc();
#endif
}

}  // namespace
}  // namespace ditattn::kernels::cpu
