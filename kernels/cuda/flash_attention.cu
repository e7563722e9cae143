// Chooses the kernel of a call.

#include "kernels/cuda/flash_attention.hpp"

#include <iterator>
#include <vector>

#include "kernels/cuda/flash_sm90.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sdpa_native.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kHopper = 90;

FlashDevice& device_of(int device) {
  static std::vector<FlashDevice> devices = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return std::vector<FlashDevice>(static_cast<std::size_t>(count));
  }();
  FlashDevice& found = devices.at(static_cast<std::size_t>(device));
  if (found.multiprocessors == 0) {
    int major = 0;
    int minor = 0;
    int multiprocessors = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    found.compute_capability = 10 * major + minor;
    found.multiprocessors = multiprocessors;
  }
  return found;
}

// Hopper's kernel, or why not.
FlashSm90Choice choose(const AttentionProblem& problem, int compute_capability, int multiprocessors) {
  if (compute_capability != kHopper) return {.reason = "a GPU of another compute capability than 9.0"};
  return choose_flash_sm90(problem, multiprocessors);
}

}  // namespace

void flash_attention(const AttentionProblem& problem, const Launch& launch) {
  if (problem.batch == 0 || problem.heads == 0 || problem.rows == 0) return;
  const OnDevice on_device(launch.device);
  FlashDevice& device = device_of(launch.device);
  const FlashSm90Choice choice = choose(problem, device.compute_capability, device.multiprocessors);
  if (choice.kernel == nullptr) return sdpa_native(problem, launch);
  launch_flash_sm90(*choice.kernel, problem, device, launch.stream);
}

std::string flash_kernel_name(const AttentionProblem& problem, int compute_capability) {
  const FlashSm90Choice choice = choose(problem, compute_capability, 0);
  if (choice.kernel == nullptr) return std::string("sdpa_native, for ") + choice.reason;
  return "flash_sm90, blocks of " + std::to_string(choice.kernel->tile.keys) + " keys";
}

std::string flash_kernels_built() {
  const std::size_t built = built_flash_sm90().size();
  constexpr std::size_t all = 2 * std::size(kFlashSm90Tiles);  // of two dtypes
  if (built == 0) return "plain";
  if (built == all) return "sm_90a";
  return "sm_90a (" + std::to_string(built) + " of " + std::to_string(all) + " kernels)";
}

}  // namespace ditattn::kernels::cuda
