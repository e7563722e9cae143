#pragma once

#include <string>

#include "ditattn/export.hpp"

namespace ditattn {

/// What the kernel calls this machine's processor ("AMD EPYC 9V74 80-Core Processor"); its architecture where it gives
/// no name (Arm).
DITATTN_API std::string cpu_name();

}  // namespace ditattn
