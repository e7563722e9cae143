#pragma once

#include <string>

#include "ditattn/log.hpp"

namespace ditattn {

/// Logs each text once in the process, or again after thousands of others: a model has hundreds of layers. Thread-safe.
void log_once(LogLevel level, const std::string& text);

}  // namespace ditattn
