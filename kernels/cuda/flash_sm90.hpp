#pragma once

/// Hopper's exact kernels.

#include <span>

#include "kernels/cuda/hopper_kernel.hpp"

namespace ditattn::kernels::cuda {

/// All of kFlashSm90Tiles that were compiled, the same at every call; none where DITATTN_CUDA_ARCHITECTURES has no
/// Hopper.
std::span<const HopperKernel> built_flash_sm90();

/// The kernel for a problem that `why_not_flash` lets through; null: `reason` says for what there is none.
struct FlashSm90Choice {
  const HopperKernel* kernel = nullptr;
  const char* reason = nullptr;
};
FlashSm90Choice choose_flash_sm90(const AttentionProblem& problem, int multiprocessors);

/// One launch on the current device, which is `device`, in a cudaStream_t; kernels of different lists need a `device`
/// each. Nothing is allocated or waited for; thread-safe. Throws std::runtime_error with CUDA's reason.
void launch_flash_sm90(const HopperKernel& kernel, const AttentionProblem& problem, FlashDevice& device, void* stream);

}  // namespace ditattn::kernels::cuda
