#include "core/fork_locks.hpp"

#include <pthread.h>

#include <mutex>
#include <new>
#include <vector>

namespace ditattn {
namespace {

struct Known {
  std::mutex mutex;
  std::vector<ForkActions> actions;
};

Known& known() {
  static Known& instance = *new Known;
  return instance;
}

void before_fork() {
  known().mutex.lock();
  for (const ForkActions& each : known().actions) {
    if (each.before != nullptr) each.before(each.lock);
  }
}

void after_fork(void (*ForkActions::*action)(void*)) {
  for (const ForkActions& each : known().actions) {
    if (each.*action != nullptr) (each.*action)(each.lock);
  }
  known().mutex.unlock();
}

}  // namespace

bool at_fork(const ForkActions& actions) {
  [[maybe_unused]] static const bool registered = [] {
    const auto in_parent = [] { after_fork(&ForkActions::in_parent); };
    const auto in_child = [] { after_fork(&ForkActions::in_child); };
    if (::pthread_atfork(&before_fork, in_parent, in_child) != 0) throw std::bad_alloc();
    return true;
  }();
  const std::lock_guard lock(known().mutex);
  known().actions.push_back(actions);
  return true;
}

}  // namespace ditattn
