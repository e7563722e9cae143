#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace ditattn {

/// The one counter of a role and a back end; it lives for ever.
std::atomic<std::uint64_t>& launch_counter(const std::string& role, const std::string& backend);

}  // namespace ditattn
