#pragma once

/// Options that several backends take in `backend_kwargs`. Shared by the CPU backends.

#include <ditattn/backend.hpp>
#include <ditattn/errors.hpp>
#include <ditattn/threads.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "backends/common/kernel_call.hpp"
#include "kernels/cpu/attention_problem.hpp"

namespace ditattn {

inline constexpr const char* kThreadsOption = "num_threads";

/// backend_kwargs["num_threads"]: at most so many threads for this layer; none: 0. ValueError for what is no number
/// from 1.
inline int thread_limit(const std::string& backend, const BackendKwargs& kwargs) {
  for (const auto& [key, value] : kwargs) {
    if (key != kThreadsOption) continue;
    const auto count = value.try_cast<std::int64_t>();
    if (count && *count >= 1) return static_cast<int>(std::min<std::int64_t>(*count, 1 << 20));
    throw ValueError(
        fmt::format("{}: backend_kwargs['num_threads'] is {}, not a whole number from 1. Give the most threads this "
                    "layer may use; more than num_threads() are never used.",
                    backend, option_text(value)));
  }
  return 0;
}

/// backend_kwargs[key], which is true or false. ValueError for what is neither.
inline bool bool_option(const std::string& backend, std::string_view key, const tvm::ffi::Any& value) {
  if (const auto boolean = value.try_cast<bool>()) return *boolean;
  throw ValueError(
      fmt::format("{}: backend_kwargs['{}'] is {}, not a boolean: true or false.", backend, key, option_text(value)));
}

/// The process's thread pool, for the kernels: `num_threads()` of it, or `limit` where that is set and less.
inline kernels::cpu::Executor cpu_executor(int limit) {
  const int threads = num_threads();
  return {.threads = limit > 0 ? std::min(limit, threads) : threads, .parallel_for = &parallel_for};
}

}  // namespace ditattn
