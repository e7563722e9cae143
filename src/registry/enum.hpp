#pragma once

#include <cstdint>

namespace ditattn {

/// Makes every member resolve its class again. Called when the class behind a path, or a platform, changes.
void forget_resolved_members();

/// Counts changes of what names and platforms lead to: what was chosen at another count has to be chosen again.
std::uint64_t registration_changes();

}  // namespace ditattn
