#pragma once

/// Which GPU kernels the environment lets a back end use.

#include <ditattn/errors.hpp>
#include <fmt/format.h>

#include <cstdlib>
#include <limits>
#include <string>

namespace ditattn {

/// The highest compute capability whose kernels may be used: DITATTN_GPU_LEVEL, read once, or more than there is.
/// Throws ValueError for what is no level.
inline int gpu_level() {
  static const int level = [] {
    const char* wanted = ::secure_getenv("DITATTN_GPU_LEVEL");
    if (wanted == nullptr || *wanted == '\0') return std::numeric_limits<int>::max();
    for (const int known : {75, 80, 89, 90}) {
      if (std::to_string(known) == wanted) return known;
    }
    throw ValueError(
        fmt::format("DITATTN_GPU_LEVEL='{}' is not one of 75, 80, 89, 90. Unset it or set one of these.", wanted));
  }();
  return level;
}

}  // namespace ditattn
