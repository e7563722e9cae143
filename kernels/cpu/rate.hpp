#pragma once

/// How fast a micro-kernel is, to compare units of one CPU.

#include "kernels/cpu/ticks.hpp"

namespace ditattn::kernels::cpu {
namespace {

/// Multiply-adds of one element per tick where `call` does `work` of them, on data in the first cache: the best of a
/// few runs of some ten thousand cycles, which an interrupt rarely meets all.
template <class Call>
double best_rate(double work, const float* result, Call call) {
  double best = 0;
  for (int run = 0; run < 12; ++run) {
    constexpr int calls = 16;
    const auto start = static_cast<double>(read_ticks());
    for (int i = 0; i < calls; ++i) {
      call();
      asm volatile("" : : "r"(result) : "memory");
    }
    const double rate = work * calls / (static_cast<double>(read_ticks()) - start);
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace
}  // namespace ditattn::kernels::cpu
