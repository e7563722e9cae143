#include "options.hpp"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace digits {
namespace {

constexpr const char* kDescription =
    "Draws handwritten digits with a small diffusion transformer; every attention goes through ditattn's registry.";

constexpr const char* kFooter =
    "Exit status:\n"
    "  0  done\n"
    "  2  wrong usage: flags, backend names\n"
    "  3  a backend is not registered or cannot be imported, or its library or device is unavailable\n"
    "  4  a file is missing, malformed or cannot be written, or tensors were refused\n"
    "  1  anything else\n";

constexpr double kMaxGuidance = 100;  // CLI11's own range check lets NaN pass

// Beside the program (bin/ and share/ditattn/), where it is installed and where it is built.
std::filesystem::path default_weights() {
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  return program.parent_path().parent_path() / "share/ditattn/digits.safetensors";
}

// Names come in any case, as everywhere in ditattn; a name given twice counts once.
std::vector<ditattn::DiffusionAttentionBackendEnum> find_backends(const std::vector<std::string>& names) {
  std::vector<ditattn::DiffusionAttentionBackendEnum> backends;
  for (std::string name : names) {
    for (char& c : name) {
      if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
    }
    const auto backend = ditattn::DiffusionAttentionBackendEnum::from_name(name);
    if (std::ranges::find(backends, backend) == backends.end()) backends.push_back(backend);
  }
  return backends;
}

// ditattn reads this variable when its first kernel runs; a bad one should not cost the user a wait.
void check_thread_count() {
  try {
    ditattn::num_threads();
  } catch (const ditattn::ValueError& error) {
    throw UsageError(error.message());
  }
}

}  // namespace

std::optional<Options> parse_options(int argc, char** argv) {
  Options options;
  options.weights = default_weights();
  std::vector<std::string> names;
  CLI::App app(kDescription, "digits");
  app.footer(kFooter);
  app.set_version_flag("--version", std::string("digits (ditattn ") + DITATTN_VERSION + ")");
  app.add_option("--backend", names,
                 "Attention backend, in any case; again for more, all from the same noise (default: ditattn chooses)")
      ->type_name("NAME")
      ->allow_extra_args(false);
  auto* seed =
      app.add_option("--seed", options.seed, "Of the noise")->capture_default_str()->check(CLI::NonNegativeNumber);
  app.add_option("--count", options.count, "Samples, of the classes 0, 1, ..., 9, 0, ... (default: 20)")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{10000}));
  app.add_option("--steps", options.sampler.steps, "Steps of the sampler")
      ->capture_default_str()
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1000}));
  app.add_option("--guidance", options.sampler.guidance, "Strength of classifier-free guidance; 1 is none")
      ->capture_default_str();
  app.add_option("--weights", options.weights, "Weights of the model")->capture_default_str()->type_name("FILE");
  app.add_option("--out", options.picture, "Picture to write, a PNG")->capture_default_str()->type_name("FILE");
  app.add_option("--samples", options.samples,
                 "Also write the samples as safetensors; several backends: one file each, FILE-NAME")
      ->type_name("FILE");
  app.add_option("--noise", options.noise, "Take noise and classes from such a file instead of --seed")
      ->type_name("FILE")
      ->excludes(seed);
  app.add_option("--capture", options.capture, "Also write query, key and value of the first image's attentions")
      ->type_name("FILE");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != static_cast<int>(CLI::ExitCodes::Success)) {
      throw UsageError(fmt::format("{}\nRun `digits --help`.", error.what()));
    }
    app.exit(error);
    return std::nullopt;
  }
  if (const double guidance = options.sampler.guidance; !(std::abs(guidance) <= kMaxGuidance)) {
    throw UsageError(fmt::format("--guidance {} is not from -{} to {}.", guidance, kMaxGuidance, kMaxGuidance));
  }
  options.backends = find_backends(names);
  check_thread_count();
  return options;
}

std::filesystem::path samples_file(const Options& options, const std::string& backend, std::size_t backends) {
  if (backends == 1) return options.samples;
  const std::filesystem::path& file = options.samples;
  return file.parent_path() / fmt::format("{}-{}{}", file.stem().string(), backend, file.extension().string());
}

}  // namespace digits
