#include "tests/cuda/sage3_sm120_emulated.hpp"

#include "kernels/cuda/sage3_quantize_launch_impl.hpp"
#include "tests/cuda/fp4_emulated_impl.hpp"
//
#include "kernels/cuda/sage3_sm120_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

template <class T, int kHead>
void launch(const AttentionProblem& p, const Sage3Images& images, bool adds_lse) {
  using Config = Sage3Sm120Config<T, kHead>;
  const Sage3Sm120Arguments a{.problem = p,
                              .images = images,
                              .order = order_tiles(p, Config::kRows),
                              .aligned_output = has_aligned_output(p),
                              .adds_lse = adds_lse};
  check(cudaFuncSetAttribute(sage3_sm120<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes),
        "cudaFuncSetAttribute");
  queue(sage3_sm120<Config>, a.order.total_tiles, Config::kThreads, Config::kSharedBytes, nullptr, "sage3_sm120", a);
}

}  // namespace

void sage3_sm120_emulated(const AttentionProblem& problem, Sage3Smoothing smoothing) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<std::size_t>(place_sage3_images(problem, nullptr, true).bytes)), "cudaMalloc");
  const Sage3Images images = place_sage3_images(problem, static_cast<char*>(memory), true);
  const Sage3Arguments arguments{.problem = problem, .images = images, .smoothing = smoothing};
  for_inputs(problem, [&]<class T, bool kAligned>() {
    const bool adds_lse = problem.lse != nullptr && smoothing.key;
    if (images.channels == 64) {
      quantize<Packed, T, kAligned, 8>(arguments, nullptr);
      launch<T, 64>(problem, images, adds_lse);
    } else {
      quantize<Packed, T, kAligned, 16>(arguments, nullptr);
      launch<T, 128>(problem, images, adds_lse);
    }
  });
  const cudaError_t status = cudaDeviceSynchronize();
  cudaFree(memory);
  check(status, "sage3_sm120_emulated");
}

}  // namespace ditattn::kernels::cuda
