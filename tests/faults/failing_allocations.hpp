#pragma once

/// Allocations that fail on demand, in the whole process: the test program has its own `malloc` family (under
/// sanitizers, which have theirs, its own `operator new`).

#include <cstddef>
#include <cstdint>

namespace ditattn::faults {

/// Whether one allocation fails, or it and all after it, as where memory is really used up.
enum class Failing : std::uint8_t { once, from_then_on };

/// While it lives, the `nth` allocation (from 1) of `at_least` bytes, of any thread, fails.
class FailingAllocation {
 public:
  FailingAllocation(std::int64_t nth, Failing failing, std::size_t at_least);
  ~FailingAllocation();
  FailingAllocation(const FailingAllocation&) = delete;
  FailingAllocation& operator=(const FailingAllocation&) = delete;

  /// From here on none fails.
  static void end();
  /// Whether that many allocations were asked for.
  [[nodiscard]] static bool has_failed();
};

/// While it lives, its thread's allocations do not count.
class Exempt {
 public:
  Exempt();
  ~Exempt();
  Exempt(const Exempt&) = delete;
  Exempt& operator=(const Exempt&) = delete;
};

}  // namespace ditattn::faults
