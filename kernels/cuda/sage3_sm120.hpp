#pragma once

/// SAGE_ATTN_3's kernels for products of NVFP4. Compiled, never run here.

#include <span>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/sage3_images.hpp"

namespace ditattn::kernels::cuda {

struct Sage3Sm120Kernel {
  int head_size;  ///< takes those up to this one
  int rows;       ///< of a tile
  ElementType type;
  int shared_bytes;
  const void* function;  ///< __global__, of Sage3Sm120Arguments
};

/// Those that were compiled, head sizes ascending, the same at every call.
std::span<const Sage3Sm120Kernel> built_sage3_sm120();

/// One launch on the current device, which is `device`, in a cudaStream_t, after packed `images` were filled there;
/// `adds_lse`: the log-sum-exp is added to what stands there. Thread-safe. Throws std::runtime_error with CUDA's
/// reason.
void launch_sage3_sm120(const Sage3Sm120Kernel& kernel, const AttentionProblem& problem, const Sage3Images& images,
                        bool adds_lse, FlashDevice& device, void* stream);

}  // namespace ditattn::kernels::cuda
