#pragma once

#include <string>

#include "tools/ditattn/output.hpp"

namespace ditattn::cli {

/// Where a measurement was made.
struct Machine {
  std::string cpu;       ///< "AMD EPYC 9V74 80-Core Processor"
  int threads = 1;       ///< used by CPU kernels
  double memory_gb = 0;  ///< physical
  std::string os;        ///< "Debian GNU/Linux 12 (bookworm), Linux 6.1.0, x86_64"
};

Machine this_machine();
Json to_json(const Machine& machine);

/// One line for people.
std::string describe(const Machine& machine);

}  // namespace ditattn::cli
