#pragma once

/// Hopper's kernels for SAGE_ATTN_3, emulated.

#include <span>

#include "kernels/cuda/hopper_kernel.hpp"
#include "kernels/cuda/sage3_images.hpp"

namespace ditattn::kernels::cuda {

/// All of kSage3Sm90Tiles that were compiled, the same at every call; none where DITATTN_CUDA_ARCHITECTURES has no
/// Hopper.
std::span<const HopperKernel> built_sage3_sm90();

/// Null where none was compiled for the problem's head size and dtype.
const HopperKernel* choose_sage3_sm90(const AttentionProblem& problem, int multiprocessors);

/// One launch on the current device, which is `device`, in a cudaStream_t, after `images` were filled there;
/// `adds_lse`: the log-sum-exp is added to what stands there. Thread-safe. Throws std::runtime_error with CUDA's
/// reason.
void launch_sage3_sm90(const HopperKernel& kernel, const AttentionProblem& problem, const Sage3Images& images,
                       bool adds_lse, FlashDevice& device, void* stream);

}  // namespace ditattn::kernels::cuda
