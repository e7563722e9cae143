#include "tools/ditattn/report_context.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/version.hpp"
#include "tools/ditattn/exit_status.hpp"
#include "tools/ditattn/libraries.hpp"
#include "tools/ditattn/summary.hpp"

namespace ditattn::cli {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxPictureBytes = 8U << 20;

std::string base64(const std::string& bytes) {
  constexpr const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t group = 0;
    for (std::size_t k = 0; k < 3; ++k) {
      group = group << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0U);
    }
    for (std::size_t k = 0; k < 4; ++k) text += i + k <= bytes.size() ? digits[group >> (18 - 6 * k) & 63U] : '=';
  }
  return text;
}

// By the first bytes; empty for what is no picture.
std::string_view media_type(const std::string& bytes) {
  if (bytes.starts_with("\x89PNG\r\n\x1a\n")) return "image/png";
  if (bytes.starts_with("\xff\xd8\xff")) return "image/jpeg";
  if (bytes.starts_with("GIF8")) return "image/gif";
  if (bytes.starts_with("RIFF") && bytes.compare(8, 4, "WEBP") == 0) return "image/webp";
  const std::size_t begin = std::min(bytes.find_first_not_of(" \t\r\n"), bytes.size());
  const std::string head = bytes.substr(begin, 1000);
  return head.starts_with('<') && head.find("<svg") != std::string::npos ? "image/svg+xml" : "";
}

std::string for_shell(const std::string& word) {
  const auto is_plain = [](unsigned char c) {
    return std::isalnum(c) != 0 || std::string_view("-_./,:=@%+").find(static_cast<char>(c)) != std::string_view::npos;
  };
  if (!word.empty() && std::ranges::all_of(word, is_plain)) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? "'\\''" : std::string(1, c);
  return quoted + "'";
}

void add_gpus(ReportContext& context) {
  const CudaInfo& cuda = cuda_info();
  for (const CudaDevice& device : cuda.devices) {
    context.facts.emplace_back(
        "GPU", fmt::format("{}, compute capability {}.{}, {} multiprocessors, {} GiB", device.name,
                           device.compute_capability / 10, device.compute_capability % 10, device.multiprocessors,
                           device.memory_bytes >> 30));
  }
  if (cuda.devices.empty()) context.facts.emplace_back("GPU", "none: " + cuda.reason);
  if (cuda.driver_version == 0) return;
  context.facts.emplace_back(
      "NVIDIA driver", fmt::format("for CUDA {}.{}", cuda.driver_version / 1000, cuda.driver_version % 1000 / 10));
}

// A library's file tells its version where it is a link to one that has it in its name. Where it lies is nobody's
// business to whom a report is given.
std::string file_of(const std::string& library) {
  std::error_code error;
  const fs::path file = fs::canonical(library, error);
  return (error ? fs::path(library) : file).filename().string();
}

}  // namespace

Picture load_picture(const std::string& caption_and_file) {
  const std::size_t equals = caption_and_file.rfind('=');
  if (equals == std::string::npos || equals == 0 || equals + 1 == caption_and_file.size()) {
    throw UsageError(fmt::format("--picture '{}' is not of the form CAPTION=FILE.", caption_and_file));
  }
  const std::string file = caption_and_file.substr(equals + 1);
  std::error_code error;
  if (!fs::is_regular_file(file, error)) throw FileError(fmt::format("--picture: there is no file '{}'.", file));
  if (const auto size = fs::file_size(file, error); error || size > kMaxPictureBytes) {
    throw FileError(
        fmt::format("--picture: '{}' has {} bytes; at most {} go into a report.", file, size, kMaxPictureBytes));
  }
  std::ifstream stream(file, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  const std::string_view type = media_type(bytes);
  if (!stream || type.empty()) {
    throw FileError(
        fmt::format("--picture: '{}' is no picture that browsers show. Give a PNG, JPEG, GIF, WebP or SVG "
                    "file.",
                    file));
  }
  return {.caption = caption_and_file.substr(0, equals),
          .data_uri = fmt::format("data:{};base64,{}", type, base64(bytes))};
}

ReportContext report_context(const Comparison& comparison, const std::vector<std::string>& words,
                             std::vector<Picture> pictures) {
  ReportContext context{
      .command = "ditattn",
      .made_at = fmt::format("{:%Y-%m-%d %H:%M} UTC",
                             fmt::gmtime(std::chrono::system_clock::to_time_t(std::chrono::system_clock::now()))),
      .facts = {},
      .pictures = std::move(pictures)};
  for (std::size_t i = 1; i < words.size(); ++i) context.command += " " + for_shell(words[i]);
  const Machine& machine = comparison.machine;
  context.facts = {{"CPU", machine.cpu},
                   {"CPU kernels", fmt::format("level {}, {} threads", cpu_level_in_effect(), machine.threads)},
                   {"memory", fmt::format("{:.0f} GB", machine.memory_gb)},
                   {"system", machine.os}};
  add_gpus(context);
  context.facts.emplace_back("ditattn", DITATTN_VERSION);
  for (const std::string& backend : available_backends(comparison)) {
    const auto& results = comparison.cases.front().results;
    context.facts.emplace_back(backend, std::ranges::find(results, backend, &BackendResult::backend)->engine);
  }
  for (const OptionalLibrary& library : optional_libraries()) {
    const Probe probe = probe_library(library.sonames);
    context.facts.emplace_back(library.name, probe.file.empty() ? "not found" : file_of(probe.file));
  }
  return context;
}

}  // namespace ditattn::cli
