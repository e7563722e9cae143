#pragma once

#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/sage_images.hpp"

namespace ditattn::kernels::cuda {

/// After SageAttention 2 (arXiv 2411.10958).
struct SageQuantization {
  bool per_thread = true;    ///< scales per row of Q, and four per block of K; else per 16 rows, and one
  bool fp8_logits = false;   ///< Q and K in e4m3, else whole numbers
  bool smooth_key = true;    ///< K less its channels' means
  bool smooth_value = true;  ///< V less its channels' means, which the output gets back
};

/// Fills `images` and, where the log-sum-exp is wanted and K is smoothed, problem.lse with scale · Q · mean, in one
/// to three launches in order. Keys that no row sees take no part; numbers that cannot be scaled, as they are not
/// finite, make their scales NaN. Throws std::runtime_error with CUDA's reason.
///
/// Q: whole numbers to ±127, or e4m3 to ±448, and a scale per row, scale · log₂e · x = number · scale, where scales are
/// not negative; K the same, less its mean, x − mean = number · scale. V: e4m3, a scale per channel over the batch
/// entry's keys: the largest becomes 448.
void quantize_sage(const AttentionProblem& problem, const SageQuantization& quantization, const SageImages& images,
                   const Launch& launch);

}  // namespace ditattn::kernels::cuda
