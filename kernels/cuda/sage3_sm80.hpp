#pragma once

/// SAGE_ATTN_3's kernels for mma.sync, emulated, as their units, one per dtype, give them to the launcher.

#include <vector>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/sage3_images.hpp"

namespace ditattn::kernels::cuda {

/// What is compiled, each for head sizes above the one before. CMake reads the line.
constexpr int kSage3Sm80HeadSizes[] = {64, 128, 256};

struct Sage3Sm80Kernel {
  int head_size;  ///< takes those up to this one
  int rows;       ///< of a tile
  ElementType type;
  int shared_bytes;
  const void* function;  ///< __global__, of Sage3Sm80Arguments
};

/// Compiled in the unit of this dtype alone, head sizes ascending.
template <ElementType kType>
std::vector<Sage3Sm80Kernel> sage3_sm80_kernels();

/// Of all dtypes that were compiled, the same at every call.
const std::vector<Sage3Sm80Kernel>& built_sage3_sm80();

/// Null where none was compiled for the problem's head size and dtype.
const Sage3Sm80Kernel* find_sage3_sm80(const AttentionProblem& problem);

/// One launch on the current device, which is `device`, in a cudaStream_t, after `images` were filled there;
/// `adds_lse`: the log-sum-exp is added to what stands there. Thread-safe. Throws std::runtime_error with CUDA's
/// reason.
void launch_sage3_sm80(const Sage3Sm80Kernel& kernel, const AttentionProblem& problem, const Sage3Images& images,
                       bool adds_lse, FlashDevice& device, void* stream);

}  // namespace ditattn::kernels::cuda
