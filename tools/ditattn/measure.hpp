#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "tools/ditattn/backend_info.hpp"
#include "tools/ditattn/comparison.hpp"
#include "tools/ditattn/inputs.hpp"
#include "tools/ditattn/rank_work.hpp"

namespace ditattn::cli {

struct MeasureOptions {
  DLDevice device = kCpu;           ///< where the backends compute
  bool causal = false;              ///< of every case, also where it does not say so itself
  std::uint64_t seed = 0;           ///< draws the sample of rows that errors are measured on
  std::optional<int> repeats;       ///< rounds; none: as many as fit in about a second, 3 to 50
  std::optional<double> max_error;  ///< none: what the dtype allows
};

/// Called before each step with what is being done.
using StepReport = std::function<void(std::string_view)>;

/// Runs every backend on one case: checks, warms up, measures the error of the first output, then times interleaved
/// rounds, so that drifts of the machine's speed meet all alike. ValueError where the case is wrong in itself. `ranks`,
/// where there are any, have the case open; what works on one rank is measured on all of them too, in the same rounds.
CaseResult measure_case(const Case& problem_case, const std::vector<BackendInfo>& backends,
                        const MeasureOptions& options, RankLeader* ranks, const StepReport& report);

}  // namespace ditattn::cli
