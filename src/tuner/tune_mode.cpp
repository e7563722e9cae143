#include "tuner/tune_mode.hpp"

#include <fmt/format.h>

#include <cstdlib>

#include "core/environment.hpp"
#include "core/text.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {

TuneMode tune_mode() {
  const std::string value = environment(Env::DITATTN_TUNE).value_or("use");
  const std::string mode = upper_case(value);
  if (mode == "USE") return TuneMode::use;
  if (mode == "OFF") return TuneMode::off;
  if (mode == "FROZEN") return TuneMode::frozen;
  if (mode == "ONLINE") return TuneMode::online;
  throw ValueError(fmt::format("DITATTN_TUNE is '{}'. Valid modes are: use, off, frozen, online", value));
}

std::filesystem::path tune_cache_folder() {
  if (const auto folder = environment(Env::DITATTN_TUNE_CACHE)) {
    if (folder->front() != '/') {
      throw ValueError(fmt::format("DITATTN_TUNE_CACHE is '{}', expected an absolute directory.", *folder));
    }
    return *folder;
  }
  // The XDG base directory specification: a relative path is not to be used.
  const auto absolute = [](const char* name) {
    const char* value = ::secure_getenv(name);
    return value != nullptr && *value == '/' ? std::filesystem::path(value) : std::filesystem::path();
  };
  if (const auto cache = absolute("XDG_CACHE_HOME"); !cache.empty()) return cache / "ditattn";
  if (const auto home = absolute("HOME"); !home.empty()) return home / ".cache" / "ditattn";
  return {};
}

}  // namespace ditattn
