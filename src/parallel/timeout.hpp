#pragma once

#include <fmt/format.h>

#include "ditattn/communicator.hpp"

namespace ditattn::parallel {

/// ValueError for a timeout that none can be.
inline void check_timeout(Seconds timeout) {
  if (timeout.count() > 0 && timeout < std::chrono::hours(24 * 365)) return;
  throw ValueError(fmt::format("A timeout of {} s: it must be more than 0 s and less than a year.", timeout.count()));
}

}  // namespace ditattn::parallel
