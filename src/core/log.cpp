#include "ditattn/log.hpp"

#include <mutex>
#include <utility>

#include "core/fork_locks.hpp"

namespace ditattn {
namespace {

struct Sink {
  std::recursive_mutex mutex;  // a handler may log
  LogHandler handler;
};

// Never destroyed: a back end may log while the process ends.
Sink& sink() {
  static Sink& instance = *new Sink;
  [[maybe_unused]] static const bool renewed = renew_in_child(instance.mutex);
  return instance;
}

}  // namespace

void set_log_handler(LogHandler handler) {
  std::lock_guard lock(sink().mutex);
  sink().handler = std::move(handler);
}

void log(LogLevel level, std::string_view message) {
  std::lock_guard lock(sink().mutex);
  if (sink().handler) sink().handler(level, message);
}

}  // namespace ditattn
