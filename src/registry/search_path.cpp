#include "registry/search_path.hpp"

#include <dlfcn.h>

#include <fstream>
#include <sstream>

#include "core/environment.hpp"
#include "ditattn/registry.hpp"
#include "registry/file_trust.hpp"

namespace ditattn {
namespace {

namespace fs = std::filesystem;

// Relative to the library's own directory; cmake/targets.cmake installs there.
constexpr const char* kInstalledBackends = "ditattn/backends";

// The non-empty entries of DITATTN_PLUGIN_PATH; those with a reason are ignored.
std::vector<IgnoredEntry> path_entries() {
  std::vector<IgnoredEntry> entries;
  std::istringstream stream(environment(Env::DITATTN_PLUGIN_PATH).value_or(""));
  for (std::string entry; std::getline(stream, entry, ':');) {
    if (entry.empty()) continue;
    std::string reason = fs::path(entry).is_absolute() ? reason_not_trusted(entry) : "it is not absolute";
    entries.push_back({.entry = entry, .reason = std::move(reason)});
  }
  return entries;
}

// Empty where the library's directory cannot be told.
std::string installed_directory() {
  const std::string library = library_directory();
  return library.empty() ? library : (fs::path(library) / kInstalledBackends).string();
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
  std::vector<std::string> directories;
  if (std::string installed = installed_directory(); !installed.empty()) directories.push_back(std::move(installed));
  for (const auto& [entry, reason] : path_entries()) {
    if (reason.empty()) directories.push_back(entry);
  }
  return directories;
}

std::vector<IgnoredEntry> ignored_search_path_entries() {
  std::vector<IgnoredEntry> entries = path_entries();
  std::erase_if(entries, [](const IgnoredEntry& entry) { return entry.reason.empty(); });
  return entries;
}

std::string reason_not_loaded(const fs::path& directory, const fs::path& file) {
  return directory == installed_directory() ? std::string() : reason_not_trusted(file);
}

std::string reason_not_built(fs::path file) {
  std::ifstream stream(file.replace_extension(".not_built"));
  std::string reason;
  std::getline(stream, reason);
  return reason;
}

}  // namespace ditattn
