#pragma once

#include <ditattn/ditattn.hpp>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "sampler.hpp"

namespace digits {

/// A command line that makes no sense; the program then ends with status 2.
class UsageError : public ditattn::ValueError {
  using ValueError::ValueError;
};

struct Options {
  std::vector<ditattn::DiffusionAttentionBackendEnum> backends;  ///< none: ditattn's selector chooses
  std::int64_t seed = 0;
  std::optional<std::int64_t> count;  ///< none: 20, or all of the noise file
  SamplerOptions sampler;
  std::filesystem::path weights;
  std::filesystem::path picture = "grid.png";
  std::filesystem::path samples;  ///< these three are empty where not asked for
  std::filesystem::path noise;
  std::filesystem::path capture;
};

/// Reads the command line; none after --help or --version, which have then been printed. UsageError, or
/// ditattn::UnknownBackendError.
std::optional<Options> parse_options(int argc, char** argv);

/// Where `--samples FILE` goes for one of `backends` backends: FILE itself, or with "-NAME" before its extension.
std::filesystem::path samples_file(const Options& options, const std::string& backend, std::size_t backends);

}  // namespace digits
