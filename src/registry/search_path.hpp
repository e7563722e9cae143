#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "ditattn/export.hpp"

namespace ditattn {

/// Where this library lies; empty where that cannot be told.
std::string library_directory();

/// An entry of DITATTN_PLUGIN_PATH that is not searched, and why: the rest of "ignored, because …".
struct IgnoredEntry {
  std::string entry;
  std::string reason;
};

/// Entries of DITATTN_PLUGIN_PATH that are not absolute, or that others may write to (file_trust.hpp).
DITATTN_API std::vector<IgnoredEntry> ignored_search_path_entries();

/// Why the file of a search directory may not be loaded: others may write to it (file_trust.hpp); empty if it may. What
/// is installed beside this library may: whoever writes there can change the library itself.
std::string reason_not_loaded(const std::filesystem::path& directory, const std::filesystem::path& file);

/// Where a backend that was not built left its reason (cmake/targets.cmake), for the plug-in file that is missing;
/// empty if there is none.
std::string reason_not_built(std::filesystem::path file);

}  // namespace ditattn
