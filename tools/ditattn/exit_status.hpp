#pragma once

#include <string>

#include "ditattn/errors.hpp"

namespace ditattn::cli {

enum ExitStatus : int {
  kDone = 0,
  kFailure = 1,        ///< anything that has no status of its own
  kUsage = 2,          ///< flags, verbs, backend names, configuration, class-path syntax
  kUnavailable = 3,    ///< a backend not registered or importable, or its library or device unavailable
  kRefused = 4,        ///< a file missing or malformed, tensors or a problem refused, memory that cannot be had
  kErrorExceeded = 5,  ///< an explicitly named backend exceeded --max-error, or `run --guard` found wrong numbers
};

/// The statuses for people, one line each.
extern const char* const kExitStatusHelp;

/// A command line that makes no sense beyond what the parser sees.
class UsageError : public ValueError {
  using ValueError::ValueError;
};

/// What went wrong and how the program ends.
struct Failure {
  ExitStatus status;
  std::string message;
};

/// Describes the exception being handled.
Failure current_failure();

}  // namespace ditattn::cli
