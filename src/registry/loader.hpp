#pragma once

#include <string>

#include "ditattn/backend.hpp"

namespace ditattn {

/// Forgets remembered failures, so that the next look-up tries again. Called when a registration changes.
void forget_failed_lookups();

}  // namespace ditattn
