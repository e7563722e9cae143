#pragma once

#include <map>
#include <string>

#include "ditattn/export.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// What measurements on a device depend on, beside each backend's own engine: "device", "name", "driver", "threads",
/// "ditattn", … Measurements made where any of these differed say nothing here. ImportError where there is no such
/// device.
using TunedFor = std::map<std::string, std::string>;
DITATTN_API TunedFor tuned_for(DLDevice device);

/// A file's name for it: the device's name, legibly, and a hash of everything.
DITATTN_API std::string file_name(const TunedFor& environment);

}  // namespace ditattn
