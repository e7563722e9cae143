#include "core/log_once.hpp"

#include <mutex>
#include <set>

#include "core/fork_locks.hpp"

namespace ditattn {

void log_once(LogLevel level, const std::string& text) {
  static std::mutex mutex;
  [[maybe_unused]] static const bool held = hold_over_fork(mutex);
  static auto& logged = *new std::set<std::string>;
  constexpr std::size_t most_kept = 4096;  // then they come again
  {
    std::lock_guard lock(mutex);
    if (logged.size() == most_kept) logged.clear();
    if (!logged.insert(text).second) return;
  }
  log(level, text);
}

}  // namespace ditattn
