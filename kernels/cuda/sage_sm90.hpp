#pragma once

/// Hopper's quantized kernels.

#include <span>

#include "kernels/cuda/hopper_kernel.hpp"
#include "kernels/cuda/sage_quantize.hpp"

namespace ditattn::kernels::cuda {

/// All of kSageSm90Tiles that were compiled, the same at every call; none where DITATTN_CUDA_ARCHITECTURES has no
/// Hopper.
std::span<const HopperKernel> built_sage_sm90();

/// Null where none was compiled for the problem's head size and dtype.
const HopperKernel* choose_sage_sm90(const AttentionProblem& problem, int multiprocessors);

/// What the kernel takes its operands from.
SageShape shape_of(const HopperKernel& kernel);

/// One launch on the current device, which is `device`, in a cudaStream_t, after `images` were filled there.
/// Thread-safe. Throws std::runtime_error with CUDA's reason.
void launch_sage_sm90(const HopperKernel& kernel, const AttentionProblem& problem, const SageImages& images,
                      const SageQuantization& quantization, FlashDevice& device, void* stream);

}  // namespace ditattn::kernels::cuda
