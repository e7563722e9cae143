// Quantized attention: fills the images of Q, K and V and launches the kernel that reads them.

#include "kernels/cuda/sage_attention.hpp"

#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sage_sm90.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kHopper = 90;

}  // namespace

std::string sage_kernels_built() { return built_sage_sm90().empty() ? "" : "sm_90a"; }

bool has_sage(std::int64_t compute_capability) { return compute_capability == kHopper && !built_sage_sm90().empty(); }

std::string sage_kernel_name(std::int64_t head_size, ElementType type) {
  AttentionProblem problem;
  problem.head_size = head_size;
  problem.type = type;
  const HopperKernel* kernel = choose_sage_sm90(problem, 1);
  return kernel == nullptr ? "" : "sage_sm90, blocks of " + std::to_string(kernel->tile.keys) + " keys";
}

std::int64_t sage_scratch_bytes(const AttentionProblem& problem) {
  return place_sage_images(problem, shape_of(*choose_sage_sm90(problem, 1)), nullptr).bytes;
}

void sage_attention(const AttentionProblem& problem, const SageQuantization& quantization, char* scratch,
                    const Launch& launch) {
  if (problem.batch == 0 || problem.heads == 0 || problem.rows == 0) return;
  const OnDevice on_device(launch.device);
  FlashDevice& device = flash_device(launch.device);
  const HopperKernel& kernel = *choose_sage_sm90(problem, device.multiprocessors);
  const SageImages images = place_sage_images(problem, shape_of(kernel), scratch);
  quantize_sage(problem, quantization, images, launch);
  launch_sage_sm90(kernel, problem, images, quantization, device, launch.stream);
}

}  // namespace ditattn::kernels::cuda
