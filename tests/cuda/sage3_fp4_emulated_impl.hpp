#pragma once

/// How tests run SAGE_ATTN_3's kernels for products of NVFP4. Included by .cu files alone.

#include "kernels/cuda/sage3_fp4.hpp"
#include "kernels/cuda/sage3_quantize_launch_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

/// Fills images, then launches `function_of(std::type_identity<Config>)`, and waits.
template <template <class, int> class Config, class FunctionOf>
void run_emulated(const AttentionProblem& p, Sage3Smoothing smoothing, const FunctionOf& function_of) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<std::size_t>(place_sage3_images(p, nullptr, true).bytes)), "cudaMalloc");
  const Sage3Images images = place_sage3_images(p, static_cast<char*>(memory), true);
  const Sage3Arguments arguments{.problem = p, .images = images, .smoothing = smoothing};
  const auto launch = [&]<class Own>(std::type_identity<Own> config) {
    const Sage3Fp4Arguments a{.problem = p,
                              .images = images,
                              .order = order_tiles(p, Own::kRows),
                              .aligned_output = has_aligned_output(p),
                              .adds_lse = p.lse != nullptr && smoothing.key};
    const auto function = function_of(config);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Own::kSharedBytes),
          "cudaFuncSetAttribute");
    queue(function, a.order.total_tiles, kSage3Fp4Threads, Own::kSharedBytes, nullptr, "run_emulated", a);
  };
  for_inputs(p, [&]<class T, bool kAligned>() {
    if (images.channels == 64) {
      quantize<Packed, T, kAligned, 8>(arguments, nullptr);
      launch(std::type_identity<Config<T, 64>>{});
    } else {
      quantize<Packed, T, kAligned, 16>(arguments, nullptr);
      launch(std::type_identity<Config<T, 128>>{});
    }
  });
  const cudaError_t status = cudaDeviceSynchronize();
  cudaFree(memory);
  check(status, "run_emulated");
}

}  // namespace
}  // namespace ditattn::kernels::cuda
