#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tests/conformance/run_case.hpp"

namespace ditattn::conformance {

/// What the command line of the conformance program chose.
struct Options {
  std::uint64_t seed = 1;
  std::string backends;                   ///< comma-separated members; empty: all
  DLDevice device = kCpu;                 ///< where cases run
  std::optional<std::uint64_t> problems;  ///< random ones for each back end; none: the test's own number
};
Options& options();

/// backends_on(options().device), or those that `--backends` names; throws std::runtime_error for one that is not
/// there.
std::vector<NamedBackend> chosen_backends();

/// Runs every combination (or `count` spread over them) with progress on stderr; the process's exit status.
int run_full(std::uint64_t count);

/// Writes cases for torch_check.py into an existing or new directory; the process's exit status.
int dump_cases(const std::string& directory);

}  // namespace ditattn::conformance
