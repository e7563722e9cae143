#pragma once

#include <string>

#include "tests/conformance/random_problem.hpp"
#include "tests/conformance/run_case.hpp"

namespace ditattn::conformance {

/// A random problem computed, and held against the oracle.
struct Checked {
  std::string refusal;  ///< why it was not computed; the rest is then 0
  Errors errors;
  double logits = 0;  ///< the largest that could be
  double bound = 0;   ///< of errors.out
  double lse_bound = 0;
};

/// Computes `drawn` with a back end on `device`. The test fails where an error is above its bound, or a row without
/// keys is not exactly zero and −∞. ValueErrors are refusals; others are thrown on.
Checked check_problem(const NamedBackend& named, const Drawn& drawn, DLDevice device);

}  // namespace ditattn::conformance
