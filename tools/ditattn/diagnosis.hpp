#pragma once

#include "tools/ditattn/output.hpp"

namespace ditattn::cli {

/// What this machine has and why each back end can or cannot be used, as `doctor --json` prints it (doctor.cpp has the
/// keys). Nothing that is broken makes it fail.
Json diagnose();

}  // namespace ditattn::cli
