#include "registry/launches.hpp"

#include <deque>
#include <mutex>

#include "core/fork_locks.hpp"
#include "ditattn/launches.hpp"

namespace ditattn {
namespace {

struct Counter {
  std::string role;
  std::string backend;
  std::atomic<std::uint64_t> calls = 0;
};

struct Counters {
  std::mutex mutex;
  std::deque<Counter> all;  // grows at its end: counters keep their places
};

// Never destroyed: a thread may call while the process ends.
Counters& counters() {
  static Counters& instance = *new Counters;
  [[maybe_unused]] static const bool held = hold_over_fork(instance.mutex);
  return instance;
}

}  // namespace

std::atomic<std::uint64_t>& launch_counter(const std::string& role, const std::string& backend) {
  std::lock_guard lock(counters().mutex);
  for (Counter& counter : counters().all) {
    if (counter.role == role && counter.backend == backend) return counter.calls;
  }
  Counter& made = counters().all.emplace_back();
  made.role = role;
  made.backend = backend;
  return made.calls;
}

std::vector<LaunchCount> launch_counts() {
  std::vector<LaunchCount> counts;
  std::lock_guard lock(counters().mutex);
  for (const Counter& counter : counters().all) {
    const std::uint64_t calls = counter.calls.load(std::memory_order_relaxed);
    if (calls > 0) counts.push_back({.role = counter.role, .backend = counter.backend, .calls = calls});
  }
  return counts;
}

void reset_launch_counts() {
  std::lock_guard lock(counters().mutex);
  for (Counter& counter : counters().all) counter.calls.store(0, std::memory_order_relaxed);
}

}  // namespace ditattn
