#pragma once

/// Draws from a generator; unlike the standard's distributions, the same on every platform.

#include <cstdint>
#include <initializer_list>

#include "tests/kernels/test_problem.hpp"

namespace ditattn::kernels::cpu::testing {

/// From low to high, both included; low where high is less.
inline std::int64_t whole(Random& random, std::int64_t low, std::int64_t high) {
  if (high <= low) return low;
  return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
}

inline double real(Random& random, double low, double high) {
  return low + (high - low) * static_cast<double>(random() >> 11) * 0x1p-53;
}

inline bool chance(Random& random, double probability) { return real(random, 0, 1) < probability; }

template <class T>
T pick(Random& random, std::initializer_list<T> values) {
  return values.begin()[whole(random, 0, static_cast<std::int64_t>(values.size()) - 1)];
}

}  // namespace ditattn::kernels::cpu::testing
