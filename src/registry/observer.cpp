#include "registry/observer.hpp"

#include <algorithm>
#include <mutex>
#include <utility>

#include "core/fork_locks.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {

std::atomic<bool> forwards_are_observed{false};

namespace {

// The list is replaced, never changed: calls hold the one they began with.
struct Registered {
  std::mutex mutex;
  std::shared_ptr<const ForwardObservers> observers;
};

// Never destroyed: a thread may call while the process ends.
Registered& registered() {
  static Registered& instance = *new Registered;
  [[maybe_unused]] static const bool held = hold_over_fork(instance.mutex);
  return instance;
}

template <class Change>
void change(const Change& body) {
  std::lock_guard lock(registered().mutex);
  ForwardObservers changed;
  if (registered().observers) changed = *registered().observers;
  body(changed);
  forwards_are_observed.store(!changed.empty(), std::memory_order_release);
  registered().observers = changed.empty() ? nullptr : std::make_shared<const ForwardObservers>(std::move(changed));
}

}  // namespace

std::shared_ptr<const ForwardObservers> forward_observers() {
  std::lock_guard lock(registered().mutex);
  return registered().observers;
}

ForwardObserver::~ForwardObserver() = default;

ForwardObservation::ForwardObservation(std::shared_ptr<ForwardObserver> observer) : observer_(std::move(observer)) {
  if (!observer_) throw ValueError("A ForwardObservation needs an observer, got null.");
  change([&](ForwardObservers& observers) { observers.push_back(observer_); });
}

ForwardObservation::~ForwardObservation() {
  change([&](ForwardObservers& observers) { observers.erase(std::ranges::find(observers, observer_)); });
}

}  // namespace ditattn
