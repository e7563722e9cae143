#include "tools/ditattn/progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <string>

#include "tools/ditattn/output.hpp"

namespace ditattn::cli {
namespace {

constexpr std::int64_t kWidth = 30;
constexpr std::chrono::seconds kQuietTime{2};
constexpr std::chrono::milliseconds kPause{100};
constexpr const char* kClearLine = "\r\x1b[K";

}  // namespace

Progress::Progress(std::int64_t total)
    : total_(total),
      on_terminal_(::isatty(STDERR_FILENO) != 0),
      next_drawing_(std::chrono::steady_clock::now() + kQuietTime) {}

Progress::~Progress() {
  if (shown_) std::fputs(kClearLine, stderr);
}

void Progress::update(std::int64_t done, std::string_view what) {
  const auto now = std::chrono::steady_clock::now();
  if (!on_terminal_ || now < next_drawing_) return;
  next_drawing_ = now + kPause;
  shown_ = true;
  const auto filled = static_cast<std::size_t>(total_ > 0 ? kWidth * done / total_ : kWidth);
  const std::string bar = std::string(filled, '#') + std::string(kWidth - filled, '.');
  std::fputs(fmt::format("{}[{}] {}/{} {}", kClearLine, bar, done, total_, printable(what)).c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace ditattn::cli
