#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "ditattn/export.hpp"

namespace ditattn {

/// Where this library lies; empty where that cannot be told.
std::string library_directory();

/// Entries of DITATTN_PLUGIN_PATH that are ignored, because they are not absolute.
DITATTN_API std::vector<std::string> ignored_search_path_entries();

/// Where a backend that was not built left its reason (cmake/targets.cmake), for the plug-in file that is missing;
/// empty if there is none.
std::string reason_not_built(std::filesystem::path file);

}  // namespace ditattn
