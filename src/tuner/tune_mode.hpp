#pragma once

#include <filesystem>

#include "ditattn/export.hpp"

namespace ditattn {

/// How defaults use measurements: DITATTN_TUNE.
enum class TuneMode {
  use,
  off,
  frozen,  ///< what the file has, and nothing else: no measuring, no writing
  online,  ///< an unknown problem is measured at its first call
};

/// As the environment has it now. ValueError for what is no mode.
DITATTN_API TuneMode tune_mode();

/// The folder of the caches' files; empty where there is none. ValueError for a relative DITATTN_TUNE_CACHE.
DITATTN_API std::filesystem::path tune_cache_folder();

}  // namespace ditattn
