#pragma once

#include <cstdint>

namespace ditattn::kernels::cpu::testing {

/// The program's flags, beside GoogleTest's.
struct Options {
  std::uint64_t seed = 0;     ///< --seed=N; a fresh one otherwise, which is printed
  std::int64_t problems = 0;  ///< --problems=N: random problems per engine
};
Options& options();

}  // namespace ditattn::kernels::cpu::testing
