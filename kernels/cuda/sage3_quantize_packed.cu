// Quantizes for SAGE_ATTN_3's kernels for products of NVFP4.

#include "kernels/cuda/sage3_quantize_launch_impl.hpp"

namespace ditattn::kernels::cuda {

void quantize_sage3_packed(const AttentionProblem& problem, Sage3Smoothing smoothing, const Sage3Images& images,
                           void* stream) {
  const Sage3Arguments arguments{.problem = problem, .images = images, .smoothing = smoothing};
  for_inputs(problem, [&]<class T, bool kAligned>() {
    if (images.channels == 64) return quantize<Packed, T, kAligned, 8>(arguments, stream);
    quantize<Packed, T, kAligned, 16>(arguments, stream);
  });
}

}  // namespace ditattn::kernels::cuda
