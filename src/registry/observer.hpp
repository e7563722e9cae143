#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "ditattn/observer.hpp"

namespace ditattn {

/// Whether anybody observes calls: all that a call asks where nobody does.
extern std::atomic<bool> forwards_are_observed;

using ForwardObservers = std::vector<std::shared_ptr<ForwardObserver>>;

/// Who observes calls now; later changes do not show in it. Null for nobody.
std::shared_ptr<const ForwardObservers> forward_observers();

}  // namespace ditattn
