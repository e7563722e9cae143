#pragma once

#include "kernels/cuda/sage3_images.hpp"

namespace ditattn::kernels::cuda {

/// Fills `images` and, where the log-sum-exp is wanted and K is smoothed, problem.lse with scale · q · k̄, in up to
/// four launches in order in a cudaStream_t of the current device. Keys that no row sees take no part. What is not
/// finite makes a scale, a correction or a number of V so. Throws std::runtime_error with CUDA's reason.
void quantize_sage3(const AttentionProblem& problem, Sage3Smoothing smoothing, const Sage3Images& images, void* stream);

/// The same for packed images, of head sizes to 128.
void quantize_sage3_packed(const AttentionProblem& problem, Sage3Smoothing smoothing, const Sage3Images& images,
                           void* stream);

}  // namespace ditattn::kernels::cuda
