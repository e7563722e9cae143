#pragma once

/// Results against the reference, with tests/conformance's bounds for logits of ordinary size: relative L2 error
/// ‖out − ref‖ / ‖Σ P·|V|‖ at most 2e-6 in float32; from 1,000 elements on 2.5e-3 in bfloat16 and 3.5e-4 in float16,
/// below that 4e-3 and 6e-4. |lse − ref| / max(1, |ref|) at most 1e-5. Rows without keys are zeros and −∞. Where the
/// reference is not finite, the result is not, and nowhere else.

#include "tests/kernels/engine.hpp"
#include "tests/kernels/reference.hpp"

namespace ditattn::kernels::cpu::testing {

/// What results may differ by: `error`, and `rounding` times what the element type's rounding and float32 sums cost.
struct Bounds {
  double error = 0;
  double lse = 0;
  double rounding = 1;
};
void check_results(const std::string& engine, const TestProblem& test, const Expected& expected, Bounds bounds);

/// Runs the engine and checks what it wrote; failures name the spec.
void run_and_check(const Engine& engine, TestProblem& test);

/// The same with random numbers for `spec`, with NaN and Inf wherever no row sees them.
void check_spec(const Engine& engine, const Spec& spec, Random& random);

/// Prints the worst errors met, one line per engine and element type.
void print_errors();

}  // namespace ditattn::kernels::cpu::testing
