#pragma once

#include <memory>
#include <vector>

#include "ditattn/observer.hpp"

namespace ditattn {

using ForwardObservers = std::vector<std::shared_ptr<ForwardObserver>>;

/// Who observes calls now; null for nobody, which costs one atomic load. Later changes do not show in it.
std::shared_ptr<const ForwardObservers> forward_observers();

}  // namespace ditattn
