// Quantized attention: chooses a kernel, fills the images of Q, K and V, and launches the kernel that reads them.

#include "kernels/cuda/sage_attention.hpp"

#include <stdexcept>

#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sage_sm80.hpp"
#include "kernels/cuda/sage_sm90.hpp"

namespace ditattn::kernels::cuda {
namespace {

// At most one of the kernels.
struct Choice {
  const HopperKernel* sm90 = nullptr;
  const SageSm80Kernel* sm80 = nullptr;

  [[nodiscard]] SageShape shape(const SageQuantization& quantization) const {
    if (sm90 != nullptr) return shape_of(*sm90);
    if (sm80 != nullptr) return shape_of(*sm80, quantization);
    throw std::runtime_error(
        "sage_attention: no kernel was compiled for this head size, dtype and GPU. Build with CUDA_SET=full.");
  }
};

Choice choose(const AttentionProblem& problem, const SageQuantization& quantization, int capability,
              int multiprocessors) {
  if (capability == kHopperCapability && !quantization.wide_values) {
    if (const HopperKernel* kernel = choose_sage_sm90(problem, multiprocessors)) return {.sm90 = kernel};
  }
  return {.sm80 = capability >= kAmpereCapability ? find_sage_sm80(problem) : nullptr};
}

}  // namespace

std::string sage_kernels_built() {
  std::string names = built_sage_sm80().empty() ? "" : "sm_80";
  if (!built_sage_sm90().empty()) names += names.empty() ? "sm_90a" : ", sm_90a";
  return names;
}

SageQuantization sage_defaults(int capability) { return {.wide_values = capability < kFp8Capability}; }

std::string sage_kernel_name(std::int64_t head_size, ElementType type, int capability) {
  AttentionProblem problem;
  problem.head_size = head_size;
  problem.type = type;
  const SageQuantization quantization = sage_defaults(capability);
  const Choice choice = choose(problem, quantization, capability, 1);
  if (choice.sm90 != nullptr) return "sage_sm90, blocks of " + std::to_string(choice.sm90->tile.keys) + " keys";
  if (choice.sm80 == nullptr) return "";
  return "sage_sm80, blocks of " + std::to_string(kSageSm80Keys) + " keys, V in " +
         (quantization.wide_values ? "float16" : "e4m3");
}

std::int64_t sage_scratch_bytes(const AttentionProblem& problem, const SageQuantization& quantization, int capability) {
  return place_sage_images(problem, choose(problem, quantization, capability, 1).shape(quantization), nullptr).bytes;
}

void sage_attention(const AttentionProblem& problem, const SageQuantization& quantization, int capability,
                    char* scratch, const Launch& launch) {
  if (problem.batch == 0 || problem.heads == 0 || problem.rows == 0) return;
  const OnDevice on_device(launch.device);
  FlashDevice& device = flash_device(launch.device);
  const Choice choice = choose(problem, quantization, capability, device.multiprocessors);
  const SageImages images = place_sage_images(problem, choice.shape(quantization), scratch);
  if (choice.sm90 != nullptr) {
    quantize_sage_sm90(problem, quantization, images, device.multiprocessors, launch.stream);
    return launch_sage_sm90(*choice.sm90, problem, images, quantization, device, launch.stream);
  }
  quantize_sage_sm80(problem, quantization, images, launch.stream);
  launch_sage_sm80(*choice.sm80, problem, images, quantization, device, launch.stream);
}

}  // namespace ditattn::kernels::cuda
