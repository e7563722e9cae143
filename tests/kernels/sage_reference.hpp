#pragma once

/// The arithmetic of sage_attention, in double precision and one number after the other: the same numbers of 8 bits,
/// the same scales, the same exponential.

#include "tests/kernels/reference.hpp"

namespace ditattn::kernels::cpu::testing {

/// What differs between levels and options.
struct SageNumbers {
  double key_most = 127;          ///< 63 where K has 7 bits
  double probability_most = 255;  ///< 127 where P has 7 bits
  bool wide_values = false;
  bool smooth_key = true;
};

Expected expected_sage_results(const AttentionProblem& problem, const SageNumbers& numbers);

}  // namespace ditattn::kernels::cpu::testing
