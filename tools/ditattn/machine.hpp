#pragma once

#include <span>
#include <string>
#include <vector>

#include "ditattn/threads.hpp"
#include "tools/ditattn/output.hpp"

namespace ditattn::cli {

/// Where a measurement was made.
struct Machine {
  std::string cpu;       ///< "AMD EPYC 9V74 80-Core Processor"
  int threads = 1;       ///< used by CPU kernels
  double memory_gb = 0;  ///< physical
  std::string os;        ///< "Debian GNU/Linux 12 (bookworm), Linux 6.1.0, x86_64"
};

/// `threads` is for a caller that must go on where DITATTN_NUM_THREADS is wrong, which is a ValueError.
Machine this_machine(int threads = num_threads());
Json to_json(const Machine& machine);

/// The names of the CPU's abilities as the kernel offers them to processes ("avx2", "amx_tile").
std::vector<std::string> cpu_features();

/// The levels of CPU kernels that this CPU can run, lowest first.
std::span<const char* const> cpu_levels();

/// DITATTN_CPU_LEVEL if this CPU has it, the best one without it, empty where it is wrong: kernels refuse then.
std::string cpu_level_in_effect();

/// One line for people.
std::string describe(const Machine& machine);

}  // namespace ditattn::cli
