#pragma once

#include <chrono>
#include <cstdint>
#include <string_view>

namespace ditattn::cli {

/// A progress bar on stderr: only on a terminal, only once the work has lasted two seconds, drawn at most ten
/// times a second, gone when destroyed.
class Progress {
 public:
  explicit Progress(std::int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// `done` of `total` steps are done; `what` is being done now.
  void update(std::int64_t done, std::string_view what);

 private:
  std::int64_t total_;
  bool on_terminal_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point next_drawing_;
};

}  // namespace ditattn::cli
