#include "registry/search_path.hpp"

#include <dlfcn.h>

#include <fstream>
#include <sstream>

#include "core/environment.hpp"
#include "ditattn/registry.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;

// Relative to the library's own directory; cmake/targets.cmake installs there.
constexpr const char* kInstalledBackends = "ditattn/backends";

// The non-empty entries of DITATTN_PLUGIN_PATH that are absolute, or those that are not.
std::vector<std::string> path_entries(bool absolute) {
  std::vector<std::string> entries;
  std::istringstream stream(environment(Env::DITATTN_PLUGIN_PATH).value_or(""));
  for (std::string entry; std::getline(stream, entry, ':');) {
    if (!entry.empty() && fs::path(entry).is_absolute() == absolute) entries.push_back(entry);
  }
  return entries;
}

}  // namespace

std::string library_directory() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&library_directory), &info) == 0) return {};
  std::error_code error;
  const fs::path file = fs::canonical(info.dli_fname, error);
  return error ? std::string() : file.parent_path().string();
}

std::vector<std::string> plugin_search_path() {
  std::vector<std::string> directories = path_entries(true);
  const std::string library = library_directory();
  if (!library.empty()) directories.insert(directories.begin(), (fs::path(library) / kInstalledBackends).string());
  return directories;
}

std::vector<std::string> ignored_search_path_entries() { return path_entries(false); }

std::string reason_not_built(fs::path file) {
  std::ifstream stream(file.replace_extension(".not_built"));
  std::string reason;
  std::getline(stream, reason);
  return reason;
}

}  // namespace ditattn
