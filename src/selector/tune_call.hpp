#pragma once

#include "ditattn/backend.hpp"

namespace ditattn {

/// DITATTN_TUNE=online: measures all that can run here on a call whose problem is not known yet, whoever may be chosen
/// for it, and keeps the result; not while the stream is captured. What goes wrong is logged, and not tried again for
/// that problem.
void tune_at_first_call(const AttentionCall& call, const Problem& problem, const ImplConfig& config);

}  // namespace ditattn
