#pragma once

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"

namespace ditattn::kernels::cuda {

/// Exact attention in float32 arithmetic on any GPU from sm_75 on: every head size, mask and stride, nothing allocated,
/// nothing waited for, safe in graph capture. All pointers are device memory, also `lengths` and `ranges`. Results do
/// not depend on the batch or on other rows, bit for bit. The plain engine: no matrix units; for speed there are
/// others. Throws std::runtime_error with CUDA's reason.
void sdpa_native(const AttentionProblem& problem, const Launch& launch);

}  // namespace ditattn::kernels::cuda
