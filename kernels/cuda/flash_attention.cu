// Chooses the kernel of a call.

#include "kernels/cuda/flash_attention.hpp"

#include <iterator>
#include <vector>

#include "kernels/cuda/flash_layout.hpp"
#include "kernels/cuda/flash_sm80.hpp"
#include "kernels/cuda/flash_sm90.hpp"
#include "kernels/cuda/flash_sm90_tiles.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sdpa_native.hpp"

namespace ditattn::kernels::cuda {
namespace {

// At most one of the kernels; the reason why not Hopper's, or neither.
struct Choice {
  const HopperKernel* sm90 = nullptr;
  const FlashSm80Kernel* sm80 = nullptr;
  const char* reason = nullptr;
};

Choice choose(const AttentionProblem& problem, int compute_capability, int multiprocessors) {
  if (const char* reason = why_not_flash(problem)) return {.reason = reason};
  FlashSm90Choice hopper{.reason = "a GPU of another compute capability than 9.0"};
  if (compute_capability == kHopperCapability) hopper = choose_flash_sm90(problem, multiprocessors);
  if (hopper.kernel != nullptr) return {.sm90 = hopper.kernel};
  if (compute_capability < kAmpereCapability) return {.reason = "a GPU of a compute capability below 8.0"};
  if (const FlashSm80Kernel* kernel = find_flash_sm80(problem)) return {.sm80 = kernel, .reason = hopper.reason};
  return {.reason = "a head size and dtype that were not compiled"};
}

}  // namespace

FlashDevice& flash_device(int device) {
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

void prepare_flash(const void* function, int shared_bytes, int bit, std::atomic<std::uint64_t>& prepared) {
  const std::uint64_t mask = std::uint64_t{1} << bit;
  if ((prepared & mask) != 0) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "cudaFuncSetAttribute");
  prepared |= mask;
}

void flash_attention(const AttentionProblem& problem, const Launch& launch, int level) {
  if (problem.batch == 0 || problem.heads == 0 || problem.rows == 0) return;
  const OnDevice on_device(launch.device);
  FlashDevice& device = flash_device(launch.device);
  const Choice choice = choose(problem, usable_capability(device.compute_capability, level), device.multiprocessors);
  if (choice.sm90 != nullptr) return launch_flash_sm90(*choice.sm90, problem, device, launch.stream);
  if (choice.sm80 != nullptr) return launch_flash_sm80(*choice.sm80, problem, device, launch.stream);
  sdpa_native(problem, launch);
}

std::string flash_kernel_name(const AttentionProblem& problem, int compute_capability, int level) {
  const auto [sm90, sm80, reason] = choose(problem, usable_capability(compute_capability, level), 1);
  if (sm90 != nullptr) return "flash_sm90, blocks of " + std::to_string(sm90->tile.keys) + " keys";
  if (sm80 != nullptr) return "flash_sm80, blocks of " + std::to_string(sm80->keys) + " keys, for " + reason;
  return std::string("sdpa_native, for ") + reason;
}

std::string flash_kernels_built() {
  const auto count = [](std::size_t built, std::size_t all) {
    return built == all ? "" : " (" + std::to_string(built) + " of " + std::to_string(all) + " kernels)";
  };
  constexpr std::size_t sm80_all = 2 * std::size(kFlashSm80HeadSizes);  // of two dtypes
  constexpr std::size_t sm90_all = 2 * std::size(kFlashSm90Tiles);
  std::string names;
  if (const std::size_t built = built_flash_sm80().size(); built != 0) names += "sm_80" + count(built, sm80_all);
  if (const std::size_t built = built_flash_sm90().size(); built != 0) {
    names += (names.empty() ? "sm_90a" : ", sm_90a") + count(built, sm90_all);
  }
  return names.empty() ? "plain" : names;
}

}  // namespace ditattn::kernels::cuda
