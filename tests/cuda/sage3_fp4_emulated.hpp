#pragma once

#include <cstdint>

#include "kernels/attention_problem.hpp"
#include "kernels/sage3.hpp"

namespace ditattn::kernels::cuda {

/// SAGE_ATTN_3's kernel for products of NVFP4 and what fills its images, on any GPU from compute capability 8.0 on,
/// with the instructions of 12.x emulated, and slow. Head sizes to 128. Waits for the end, and throws
/// std::runtime_error with CUDA's reason.
void sage3_sm120_emulated(const AttentionProblem& problem, Sage3Smoothing smoothing);

/// The same with those of 10.x, on compute capability 9.0, at most 64 tiles of 128 rows. What no instruction could be
/// given ends in an error of the launch.
void sage3_sm100_emulated(const AttentionProblem& problem, Sage3Smoothing smoothing);

}  // namespace ditattn::kernels::cuda
