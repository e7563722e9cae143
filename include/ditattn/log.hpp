#pragma once

#include <functional>
#include <string_view>

#include "ditattn/export.hpp"

namespace ditattn {

/// How grave a message is; in Python the levels of `logging`.
enum class LogLevel { debug, info, warning, error };

/// Gets one message. It must neither log nor set a handler.
using LogHandler = std::function<void(LogLevel, std::string_view)>;

/// Sets where messages go. The library itself never prints: without a handler (the default, or an empty one)
/// messages are dropped. Thread-safe; the handler is called by one thread at a time.
DITATTN_API void set_log_handler(LogHandler handler);

/// Passes one message to the handler, if there is one. Thread-safe.
DITATTN_API void log(LogLevel level, std::string_view message);

}  // namespace ditattn
