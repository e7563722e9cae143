#pragma once

/// Hopper's kernels as their units (flash_sm90_units.cmake), one per tile and dtype, give them to the launcher.

#include <span>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/flash_sm90_tiles.hpp"

namespace ditattn::kernels::cuda {

struct FlashSm90Kernel {
  FlashSm90Tile tile;
  ElementType type;
  int place;  ///< among the kernels of its list: FlashDevice::prepared_sm90 has two bits for each
  int threads;
  int shared_bytes;
  const void* functions[2];  ///< __global__, of FlashSm90Arguments: without and with masks
};

/// All of kFlashSm90Tiles that were compiled, the same at every call; none where DITATTN_CUDA_ARCHITECTURES has no
/// Hopper.
std::span<const FlashSm90Kernel> built_flash_sm90();

/// The kernel for a problem that `why_not_flash` lets through; null: `reason` says for what there is none.
struct FlashSm90Choice {
  const FlashSm90Kernel* kernel = nullptr;
  const char* reason = nullptr;
};
FlashSm90Choice choose_flash_sm90(const AttentionProblem& problem, int multiprocessors);

/// One launch on the current device, which is `device`, in a cudaStream_t; kernels of different lists need a `device`
/// each. Nothing is allocated or waited for; thread-safe. Throws std::runtime_error with CUDA's reason.
void launch_flash_sm90(const FlashSm90Kernel& kernel, const AttentionProblem& problem, FlashDevice& device,
                       void* stream);

}  // namespace ditattn::kernels::cuda
