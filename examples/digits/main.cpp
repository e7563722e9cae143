/// Draws digits with every attention going through ditattn's registry: the whole way from weights to a picture.

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <limits>

#include "capture.hpp"
#include "options.hpp"
#include "picture.hpp"

namespace digits {
namespace {

enum ExitStatus : int { kDone = 0, kFailure = 1, kUsage = 2, kUnavailable = 3, kRefused = 4 };

struct NamedBackend {
  std::string name;
  ditattn::BackendClass backend;
};

struct Run {
  std::string name;
  Images samples;
  double seconds = 0;
};

// The backends named on the command line, or the selector's choice for this model's attention.
std::vector<NamedBackend> load_backends(const Options& options) {
  std::vector<NamedBackend> loaded;
  for (const auto member : options.backends) {
    loaded.push_back({member.name(), member.get_class()});
    loaded.back().backend->validate_available();
  }
  return loaded;
}

NamedBackend select_backend(const ModelConfig& config, std::int64_t images) {
  const ditattn::Selection choice = ditattn::select_backend({.batch = 2 * images,
                                                             .num_heads = config.heads,
                                                             .num_kv_heads = config.heads,
                                                             .seq_q = config.tokens(),
                                                             .seq_kv = config.tokens(),
                                                             .head_size = config.head_size()});
  return {choice.member.name(), choice.backend};
}

// Said before minutes of sampling, not after.
void check_can_write(const std::filesystem::path& file) {
  if (file.empty()) return;
  const std::filesystem::path folder = file.has_parent_path() ? file.parent_path() : ".";
  std::error_code error;
  const char* reason = nullptr;
  if (std::filesystem::is_directory(file, error)) {
    reason = "it is a directory";
  } else if (!std::filesystem::is_directory(folder, error)) {
    reason = "there is no such directory";
  } else if (::access(folder.c_str(), W_OK) != 0) {
    reason = "its directory cannot be written to";
  }
  if (reason != nullptr) throw ditattn::FileError(fmt::format("Cannot write '{}': {}.", file.string(), reason));
}

// On a terminal only, and gone when the work is done.
void show_progress(const std::string& backend, std::int64_t step, std::int64_t first_image, const Options& options) {
  static const bool on_terminal = ::isatty(STDERR_FILENO) != 0;
  if (!on_terminal) return;
  fmt::print(stderr, "\r\x1b[K{}: from image {}, step {}/{}", backend, first_image, step + 1, options.sampler.steps);
  if (step + 1 == options.sampler.steps) fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
}

Run sample_with(const NamedBackend& backend, Model& model, const Images& noise, const Options& options,
                Capture* capture) {
  const AttentionLayers attention = make_attention_layers(*backend.backend, model.config());
  const auto start = std::chrono::steady_clock::now();
  Images samples =
      sample(model, attention, noise, options.sampler, [&](std::int64_t step, std::int64_t first) -> AttentionObserver {
        show_progress(backend.name, step, first, options);
        return capture != nullptr ? capture->at(step, first) : AttentionObserver();
      });
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  return {.name = backend.name, .samples = std::move(samples), .seconds = time.count()};
}

// Beside every backend's name but the first's: how far it is from the first.
std::string note_for(const Run& run, const Run& first) {
  if (&run == &first) return {};
  const Difference difference = compare(run.samples, first.samples);
  if (difference.largest == 0) return fmt::format("EQUAL TO {}", first.name);
  return fmt::format("MAX DIFF {:.7f}  PSNR {:.1f} DB", difference.largest, difference.psnr);
}

void write_all(const std::vector<Run>& runs, const Images& noise, const ModelConfig& config, const Options& options) {
  std::vector<Block> blocks;
  for (const Run& run : runs) {
    const std::string note = note_for(run, runs.front());
    blocks.push_back({.name = run.name, .note = note, .samples = run.samples});
    fmt::print("{:<16} {} samples in {:6.2f} s, {:.3f} s each  {}\n", run.name, run.samples.classes.size(), run.seconds,
               run.seconds / static_cast<double>(run.samples.classes.size()), note);
    if (options.samples.empty()) continue;
    const std::filesystem::path file = samples_file(options, run.name, runs.size());
    save_samples(file, config, run.samples, noise, options.sampler);
    fmt::print("wrote {}\n", file.string());
  }
  save_picture(options.picture, config, blocks);
  fmt::print("wrote {}\n", options.picture.string());
}

std::string made_by(const NamedBackend& backend, const Images& noise, const Options& options) {
  const std::string start =
      options.noise.empty() ? fmt::format("--seed {}", options.seed) : "--noise " + options.noise.filename().string();
  return fmt::format("digits --backend {} {} --count {} --steps {} --guidance {}", backend.name, start,
                     noise.classes.size(), options.sampler.steps, options.sampler.guidance);
}

void run(const Options& options) {
  std::vector<NamedBackend> backends = load_backends(options);
  for (const auto& file : {options.picture, options.samples, options.capture}) check_can_write(file);
  use_serial_blas();
  Model model(load_weights(options.weights));
  const ModelConfig config = model.config();
  const Images noise = options.noise.empty() ? draw_noise(config, options.seed, options.count.value_or(20))
                                             : load_noise(options.noise, config, options.count);
  if (backends.empty()) backends.push_back(select_backend(config, static_cast<std::int64_t>(noise.classes.size())));

  Capture capture(config, options.sampler);
  std::vector<Run> runs;
  for (const NamedBackend& backend : backends) {
    const bool is_captured = !options.capture.empty() && runs.empty();
    runs.push_back(sample_with(backend, model, noise, options, is_captured ? &capture : nullptr));
  }
  if (!options.capture.empty()) {
    capture.save(options.capture, made_by(backends.front(), noise, options));
    fmt::print("wrote {}\n", options.capture.string());
  }
  write_all(runs, noise, config, options);
}

int report(ExitStatus status, const std::string& message) {
  fmt::print(stderr, "digits: error: {}\n", message);
  return status;
}

int main_program(int argc, char** argv) {
  ditattn::set_log_handler([](ditattn::LogLevel level, std::string_view message) {
    if (level >= ditattn::LogLevel::warning) fmt::print(stderr, "digits: {}\n", message);
  });
  try {
    if (const auto options = parse_options(argc, argv)) run(*options);
    return kDone;
  } catch (const UsageError& error) {
    return report(kUsage, error.message());
  } catch (const ditattn::UnknownBackendError& error) {
    return report(kUsage, error.message());
  } catch (const ditattn::NotRegisteredError& error) {
    return report(kUnavailable, error.message());
  } catch (const ditattn::ImportError& error) {
    return report(kUnavailable, error.message());
  } catch (const ditattn::ValueError& error) {
    return report(kRefused, error.message());
  } catch (const ditattn::NotImplementedError& error) {
    return report(kRefused, error.message());
  } catch (const ditattn::FileError& error) {
    return report(kRefused, error.message());
  } catch (const ditattn::MemoryError& error) {
    return report(kRefused, error.message());
  } catch (const std::exception& error) {
    return report(kFailure, error.what());
  }
}

}  // namespace
}  // namespace digits

int main(int argc, char** argv) { return digits::main_program(argc, argv); }
