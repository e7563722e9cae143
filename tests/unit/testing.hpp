#pragma once

/// Helpers of the unit and plug-in tests: errors with their exact type, the log as a list, variables for one test.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"

namespace ditattn::testing {

/// Text of the `Expected` that `function` throws. Another type, or none, fails the test and gives "".
template <class Expected, class Function>
std::string error_text(Function&& function) {
  try {
    function();
  } catch (const Expected& error) {
    return error.message();
  } catch (const tvm::ffi::Error& error) {
    ADD_FAILURE() << "an error of another type was thrown: " << error.kind() << ": " << error.message();
    return {};
  } catch (const std::exception& error) {
    ADD_FAILURE() << "not an error of the library: " << error.what();
    return {};
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

/// The test fails unless `text` contains every one of `parts`.
inline void expect_contains(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(text.find(part), std::string::npos) << "missing: " << part << "\nin: " << text;
  }
}

/// `stem` and a number that no call gave before. Members, classes, modules and what was logged once stay in the
/// process: under such a name a test finds none of it when it is repeated.
inline std::string unused(const std::string& stem) {
  static int used = 0;
  return stem + std::to_string(used++);
}

/// Records the library's log while it lives.
class LogRecorder {
 public:
  LogRecorder() {
    set_log_handler([this](LogLevel level, std::string_view text) { entries.emplace_back(level, std::string(text)); });
  }
  ~LogRecorder() { set_log_handler({}); }
  LogRecorder(const LogRecorder&) = delete;
  LogRecorder& operator=(const LogRecorder&) = delete;

  /// Messages of `level`.
  [[nodiscard]] std::vector<std::string> of(LogLevel level) const {
    std::vector<std::string> result;
    for (const auto& [entry_level, text] : entries) {
      if (entry_level == level) result.push_back(text);
    }
    return result;
  }

  std::vector<std::pair<LogLevel, std::string>> entries;
};

/// Sets an environment variable (null: unsets it) and restores it.
class ScopedEnvironment {
 public:
  ScopedEnvironment(const char* name, const char* value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    value != nullptr ? ::setenv(name, value, 1) : ::unsetenv(name);
  }
  ~ScopedEnvironment() { before_ ? ::setenv(name_, before_->c_str(), 1) : ::unsetenv(name_); }
  ScopedEnvironment(const ScopedEnvironment&) = delete;
  ScopedEnvironment& operator=(const ScopedEnvironment&) = delete;

 private:
  const char* name_;
  std::optional<std::string> before_;
};

/// Runs `function`, which returns an exit status, in a forked child; −1 if the child did not end by itself.
template <class Function>
int status_in_child(Function&& function) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(function());
  int status = 0;
  if (child < 0 || ::waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

}  // namespace ditattn::testing
