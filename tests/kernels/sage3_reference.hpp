#pragma once

/// docs/kernels/sage3.md in double precision and one number after the other. Means are rounded to float32, and what is
/// rounded to NVFP4 is a float32 number rounded by kernels/nvfp4.hpp, as the formats have it.

#include "kernels/sage3.hpp"
#include "tests/kernels/reference.hpp"

namespace ditattn::kernels::cpu::testing {

/// Keys are seen or not by all heads alike. NaN and Inf may stand where no row sees them, and nowhere else. `magnitude`
/// is Σ P · (|V̂| + |v̄|).
Expected expected_sage3_results(const AttentionProblem& problem, Sage3Smoothing smoothing);

}  // namespace ditattn::kernels::cpu::testing
