#pragma once

/// Work in pieces of different sizes. For units without flags of their own.

#include <atomic>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu {

/// Runs body(slot, i) for i in [0, count) in order on as many slots as there are threads: i is handed out only after
/// all before it were.
template <class Body>
void in_order(const Executor& executor, std::int64_t slots, std::int64_t count, const Body& body) {
  struct Run {
    std::int64_t count;
    const Body& body;
    std::atomic<std::int64_t> next{0};
  } run{.count = count, .body = body};
  executor.parallel_for(
      slots,
      [](void* context, std::int64_t slot) {
        auto& work = *static_cast<Run*>(context);
        for (std::int64_t i = work.next++; i < work.count; i = work.next++) work.body(slot, i);
      },
      &run);
}

}  // namespace ditattn::kernels::cpu
