#pragma once

#include <cstdint>

#include "kernels/attention_problem.hpp"
#include "kernels/sage3.hpp"

namespace ditattn::kernels::cuda {

/// SAGE_ATTN_3's kernel for products of NVFP4 and what fills its images, on any GPU from compute capability 8.0 on,
/// with the instructions of 12.x emulated, and slow. Head sizes to 128. Waits for the end, and throws
/// std::runtime_error with CUDA's reason.
void sage3_sm120_emulated(const AttentionProblem& problem, Sage3Smoothing smoothing);

}  // namespace ditattn::kernels::cuda
