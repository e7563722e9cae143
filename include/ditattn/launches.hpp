#pragma once

/// Which back end really computed, and how often: for users who asked for one and want to see that it ran.

#include <cstdint>
#include <string>
#include <vector>

#include "ditattn/export.hpp"

namespace ditattn {

/// Calls of `AttentionImpl::forward` that computed something, for one role by one back end.
struct LaunchCount {
  std::string role;         ///< `ImplConfig::role`; empty where none was given
  std::string backend;      ///< its `get_name()`: of the one that ran, also behind a platform's default
  std::uint64_t calls = 0;  ///< above zero
};

/// Counts since the process began or `reset_launch_counts`, those above zero, in the order in which such a layer was
/// first built. Counting costs a call an atomic addition. Thread-safe.
DITATTN_API std::vector<LaunchCount> launch_counts();

/// Sets all counts to zero. Thread-safe.
DITATTN_API void reset_launch_counts();

}  // namespace ditattn
