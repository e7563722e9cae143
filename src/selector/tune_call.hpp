#pragma once

#include "selector/default_backend.hpp"

namespace ditattn {

/// DITATTN_TUNE=online: measures the rules' candidates on a call whose problem is not known yet, and keeps the result;
/// not while the stream is captured. What goes wrong is logged, and not tried again for that problem.
void tune_at_first_call(const AttentionCall& call, const Problem& problem, const ImplConfig& config,
                        const DispatchRules& rules);

}  // namespace ditattn
