#pragma once

/// SAGE_ATTN_3's kernels for products of NVFP4. Compiled, never run here.

#include <span>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/flash_layout.hpp"
#include "kernels/cuda/sage3_images.hpp"

namespace ditattn::kernels::cuda {

constexpr int kSage3Fp4Threads = 128;

/// What these kernels take.
struct Sage3Fp4Arguments {
  AttentionProblem problem;
  Sage3Images images;  ///< packed
  TileOrder order;
  bool aligned_output;
  bool adds_lse;  ///< the log-sum-exp is added to what stands there
};

struct Sage3Fp4Kernel {
  const char* name;
  int index;      ///< among those of its name
  int head_size;  ///< takes those up to this one
  int rows;       ///< of a tile
  ElementType type;
  int shared_bytes;
  const void* function;  ///< __global__, of Sage3Fp4Arguments
};

/// Those for mma.sync (compute capability 12.x) and for tcgen05 (10.0, 10.3) that were compiled, head sizes ascending,
/// the same at every call.
std::span<const Sage3Fp4Kernel> built_sage3_sm120();
std::span<const Sage3Fp4Kernel> built_sage3_sm100();

}  // namespace ditattn::kernels::cuda
