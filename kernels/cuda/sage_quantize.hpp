#pragma once

#include "kernels/cuda/sage_images.hpp"

namespace ditattn::kernels::cuda {

/// After SageAttention 2 (arXiv 2411.10958).
struct SageQuantization {
  bool per_thread = true;    ///< scales per row of Q, and four per block of K; else per 16 rows, and one
  bool fp8_logits = false;   ///< Q and K in e4m3, else whole numbers
  bool wide_values = false;  ///< V and probabilities in float16, else e4m3
  bool smooth_key = true;    ///< K less its channels' means
  bool smooth_value = true;  ///< V less its channels' means, which the output gets back
};

/// Fills `images` and, where the log-sum-exp is wanted and K is smoothed, problem.lse with scale · Q · mean, in one
/// to four launches in order in a cudaStream_t of the current device. Keys that no row sees take no part; numbers that
/// cannot be scaled, as they are not finite, make their scales NaN. Throws std::runtime_error with CUDA's reason.
///
/// Q: whole numbers to ±127, or e4m3 to ±448, and a scale per row, scale · log₂e · x = number · scale, where scales are
/// not negative; K the same, less its mean, x − mean = number · scale. V: e4m3 or float16, a scale per channel over the
/// batch entry's keys: the largest becomes 448.
///
/// The same numbers from both: for Hopper's kernels, and for those for mma.sync, of blocks of 64 keys.
void quantize_sage_sm90(const AttentionProblem& problem, const SageQuantization& quantization, const SageImages& images,
                        int multiprocessors, void* stream);
void quantize_sage_sm80(const AttentionProblem& problem, const SageQuantization& quantization, const SageImages& images,
                        void* stream);

}  // namespace ditattn::kernels::cuda
