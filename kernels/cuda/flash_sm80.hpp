#pragma once

/// The kernels for mma.sync as their units, one per dtype, give them to the launcher.

#include <vector>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/flash_device.hpp"

namespace ditattn::kernels::cuda {

/// What is compiled, each for head sizes above the one before. CMake reads the line.
constexpr int kFlashSm80HeadSizes[] = {64, 96, 128, 192, 256};

struct FlashSm80Kernel {
  int head_size;  ///< takes those up to this one
  int rows;       ///< of a tile
  int keys;       ///< of a block
  ElementType type;
  int shared_bytes;
  const void* functions[2];  ///< __global__, of FlashSm80Arguments: without and with masks
};

/// Compiled in the unit of this dtype alone, head sizes ascending.
template <ElementType kType>
std::vector<FlashSm80Kernel> flash_sm80_kernels();

/// Of all dtypes that were compiled, the same at every call.
const std::vector<FlashSm80Kernel>& built_flash_sm80();

/// The kernel for a problem that `why_not_flash` lets through; null: none was compiled.
const FlashSm80Kernel* find_flash_sm80(const AttentionProblem& problem);

/// One launch on the current device, which is `device`, in a cudaStream_t. Nothing is allocated or waited for;
/// thread-safe. Throws std::runtime_error with CUDA's reason.
void launch_flash_sm80(const FlashSm80Kernel& kernel, const AttentionProblem& problem, FlashDevice& device,
                       void* stream);

}  // namespace ditattn::kernels::cuda
