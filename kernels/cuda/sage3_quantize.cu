// Quantizes for the kernels that emulate SAGE_ATTN_3.

#include "kernels/cuda/sage3_quantize_launch_impl.hpp"

namespace ditattn::kernels::cuda {

void quantize_sage3(const AttentionProblem& problem, Sage3Smoothing smoothing, const Sage3Images& images,
                    void* stream) {
  const Sage3Arguments arguments{.problem = problem, .images = images, .smoothing = smoothing};
  for_inputs(problem, [&]<class T, bool kAligned>() {
    if (images.channels <= 64) return quantize<Emulated<T>, T, kAligned, 8>(arguments, stream);
    if (images.channels <= 128) return quantize<Emulated<T>, T, kAligned, 16>(arguments, stream);
    quantize<Emulated<T>, T, kAligned, 32>(arguments, stream);
  });
}

}  // namespace ditattn::kernels::cuda
