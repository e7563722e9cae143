#pragma once

/// Which of the CPU's instruction sets the kernels use. Shared by the CPU backends.

#include <ditattn/errors.hpp>

#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/cpu/cpu_level.hpp"

namespace ditattn {

struct CpuLevelChoice {
  kernels::cpu::CpuLevel level;
  bool forced = false;
};

inline CpuLevelChoice choose_cpu_level() {
  using kernels::cpu::kCpuLevelNames;
  const kernels::cpu::CpuLevel best = kernels::cpu::detect_cpu_level();
  const char* wanted = ::secure_getenv("DITATTN_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return {.level = best};
  for (int level = 0; level <= static_cast<int>(best); ++level) {
    if (std::strcmp(wanted, kCpuLevelNames[level]) == 0) {
      return {.level = static_cast<kernels::cpu::CpuLevel>(level), .forced = true};
    }
  }
  throw ValueError(std::string("DITATTN_CPU_LEVEL='") + wanted + "' is not a level this CPU has: " + kCpuLevelNames[0] +
                   " up to " + kCpuLevelNames[static_cast<int>(best)] + ".");
}

/// The best level of this CPU, or the one that DITATTN_CPU_LEVEL names. ValueError if the CPU does not have that.
inline CpuLevelChoice cpu_level() {
  static const CpuLevelChoice choice = choose_cpu_level();
  return choice;
}

}  // namespace ditattn
