#pragma once

#include <vector>

#include "ditattn/tuner.hpp"
#include "tuner/tuned_table.hpp"

namespace ditattn {

/// A backend to be measured, or what speaks against it.
struct Contender {
  Member member;
  BackendClass backend;
  Verdict verdict;
};

/// Measures contenders on one checked call, as `tune` describes it, into memory of its own: `call.out` and `call.lse`
/// are neither read nor written. Nobody who observes or counts calls is told. MemoryError where there is no memory for
/// an output.
TunedProblem measure_call(const AttentionCall& call, const Problem& problem, const ImplConfig& config,
                          const std::vector<Contender>& contenders, const TuneOptions& options);

}  // namespace ditattn
