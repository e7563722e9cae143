// Microscaled FP4 attention: fills the images of Q, K and V, and launches the kernel that reads them.

#include "kernels/cuda/sage3_attention.hpp"

#include <algorithm>
#include <span>
#include <stdexcept>

#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sage3_fp4.hpp"
#include "kernels/cuda/sage3_quantize.hpp"
#include "kernels/cuda/sage3_sm80.hpp"
#include "kernels/cuda/sage3_sm90.hpp"

namespace ditattn::kernels::cuda {
namespace {

// The kernels for GPUs that have products of NVFP4, as far as they were compiled for: by mma.sync of compute capability
// 12.x, by tcgen05 of 10.0 and, with a newer nvcc, 10.3.
#ifdef DITATTN_SAGE3_SM120
std::span<const Sage3Fp4Kernel> kernels_of_sm120() { return built_sage3_sm120(); }
bool has_mma_fp4(int capability) { return capability >= 120 && capability <= DITATTN_SAGE3_SM120; }
#else
std::span<const Sage3Fp4Kernel> kernels_of_sm120() { return {}; }
bool has_mma_fp4(int) { return false; }
#endif
#ifdef DITATTN_SAGE3_SM100
std::span<const Sage3Fp4Kernel> kernels_of_sm100() { return built_sage3_sm100(); }
bool has_tcgen05(int capability) { return capability == 100 || capability == DITATTN_SAGE3_SM100; }
#else
std::span<const Sage3Fp4Kernel> kernels_of_sm100() { return {}; }
bool has_tcgen05(int) { return false; }
#endif

// At most one of the kernels.
struct Choice {
  const HopperKernel* sm90 = nullptr;
  const Sage3Sm80Kernel* sm80 = nullptr;
  const Sage3Fp4Kernel* fp4 = nullptr;
};

Choice choose(const AttentionProblem& problem, int capability, int multiprocessors) {
  const auto kernels = has_mma_fp4(capability)   ? kernels_of_sm120()
                       : has_tcgen05(capability) ? kernels_of_sm100()
                                                 : std::span<const Sage3Fp4Kernel>();
  const auto found = std::ranges::find_if(kernels, [&](const Sage3Fp4Kernel& kernel) {
    return kernel.type == problem.type && problem.head_size <= kernel.head_size;
  });
  if (found != kernels.end()) return {.fp4 = &*found};
  if (capability == kHopperCapability) {
    if (const HopperKernel* kernel = choose_sage3_sm90(problem, multiprocessors)) return {.sm90 = kernel};
  }
  return {.sm80 = capability >= kAmpereCapability ? find_sage3_sm80(problem) : nullptr};
}

[[maybe_unused]] void launch_sage3_fp4(const Sage3Fp4Kernel& kernel, const AttentionProblem& p,
                                       const Sage3Images& images, bool adds_lse, FlashDevice& device, void* stream) {
  Sage3Fp4Arguments a{.problem = p,
                      .images = images,
                      .order = order_tiles(p, kernel.rows),
                      .aligned_output = has_aligned_output(p),
                      .adds_lse = adds_lse};
  prepare_flash(kernel.function, kernel.shared_bytes, kernel.index, device.prepared_sage3_fp4);
  void* pointers[] = {&a};
  check(cudaLaunchKernel(kernel.function, dim3(a.order.total_tiles), dim3(kSage3Fp4Threads), pointers,
                         static_cast<std::size_t>(kernel.shared_bytes), static_cast<cudaStream_t>(stream)),
        kernel.name);
}

}  // namespace

std::string sage3_kernels_built() {
  std::string names;
  const auto add = [&](bool built, const char* name) {
    if (built) names += names.empty() ? name : std::string(", ") + name;
  };
  add(!built_sage3_sm80().empty(), "sm_80 (emulated)");
  add(!built_sage3_sm90().empty(), "sm_90a (emulated)");
  add(!kernels_of_sm100().empty(), "sm_100a (NVFP4; compiled, never run here)");
  add(!kernels_of_sm120().empty(), "sm_120 (NVFP4; compiled, never run here)");
  return names;
}

std::string sage3_kernel_name(std::int64_t head_size, ElementType type, int capability) {
  AttentionProblem problem;
  problem.head_size = head_size;
  problem.type = type;
  const Choice choice = choose(problem, capability, 1);
  if (choice.fp4 != nullptr) return std::string(choice.fp4->name) + ", NVFP4 (compiled, never run here)";
  if (choice.sm90 != nullptr) return "sage3_sm90, emulated NVFP4";
  return choice.sm80 != nullptr ? "sage3_sm80, emulated NVFP4" : "";
}

std::int64_t sage3_scratch_bytes(const AttentionProblem& problem, int capability) {
  return place_sage3_images(problem, nullptr, choose(problem, capability, 1).fp4 != nullptr).bytes;
}

void sage3_attention(const AttentionProblem& problem, Sage3Smoothing smoothing, int capability, char* scratch,
                     const Launch& launch) {
  if (problem.batch == 0 || problem.heads == 0 || problem.rows == 0) return;
  const OnDevice on_device(launch.device);
  FlashDevice& device = flash_device(launch.device);
  const Choice choice = choose(problem, capability, device.multiprocessors);
  const Sage3Images images = place_sage3_images(problem, scratch, choice.fp4 != nullptr);
  const bool adds_lse = problem.lse != nullptr && smoothing.key;
#if defined(DITATTN_SAGE3_SM100) || defined(DITATTN_SAGE3_SM120)
  if (choice.fp4 != nullptr) {
    quantize_sage3_packed(problem, smoothing, images, launch.stream);
    return launch_sage3_fp4(*choice.fp4, problem, images, adds_lse, device, launch.stream);
  }
#endif
  if (choice.sm90 == nullptr && choice.sm80 == nullptr) {
    throw std::runtime_error(
        "sage3_attention: no kernel was compiled for this head size, dtype and GPU. Build with CUDA_SET=full.");
  }
  quantize_sage3(problem, smoothing, images, launch.stream);
  if (choice.sm90 != nullptr) {
    launch_sage3_sm90(*choice.sm90, problem, images, adds_lse, device, launch.stream);
  } else {
    launch_sage3_sm80(*choice.sm80, problem, images, adds_lse, device, launch.stream);
  }
}

}  // namespace ditattn::kernels::cuda
