#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace ditattn::kernels::cuda {

/// What the launchers know of a device.
struct FlashDevice {
  std::atomic<int> compute_capability = 0;  ///< 90 for 9.0; 0: not asked yet
  std::atomic<int> multiprocessors = 0;
  std::atomic<std::uint64_t> prepared_sm80 = 0;  ///< a bit for each function of the built kernels
  std::atomic<std::uint64_t> prepared_sm90 = 0;
  std::atomic<std::uint64_t> prepared_sage_sm80 = 0;
  std::atomic<std::uint64_t> prepared_sage_sm90 = 0;
  std::atomic<std::uint64_t> prepared_sage3_sm80 = 0;
  std::atomic<std::uint64_t> prepared_sage3_sm90 = 0;
  std::atomic<std::uint64_t> prepared_sage3_fp4 = 0;
};

constexpr int kAmpereCapability = 80;  ///< the first with a kernel on matrix units here
constexpr int kHopperCapability = 90;

/// The compute capability of whose kernels may be used at a level (DITATTN_GPU_LEVEL). Hopper's run there alone: a
/// lower level on a newer GPU leaves those for mma.sync.
inline int usable_capability(int compute_capability, int level) {
  return compute_capability <= level ? compute_capability : std::min(level, kHopperCapability - 1);
}

/// The device's, made at the first call for it. Throws std::runtime_error with CUDA's reason.
FlashDevice& flash_device(int device);

/// Lets a __global__ function have its shared memory, which is more than the default, once: `bit` is its own in
/// `prepared`. Throws std::runtime_error with CUDA's reason.
void prepare_flash(const void* function, int shared_bytes, int bit, std::atomic<std::uint64_t>& prepared);

}  // namespace ditattn::kernels::cuda
