#pragma once

#include <atomic>
#include <cstdint>

namespace ditattn::kernels::cuda {

/// What the launchers know of a device.
struct FlashDevice {
  std::atomic<int> compute_capability = 0;  ///< 90 for 9.0; 0: not asked yet
  std::atomic<int> multiprocessors = 0;
  std::atomic<std::uint64_t> prepared_sm80 = 0;  ///< a bit for each function of the built kernels
  std::atomic<std::uint64_t> prepared_sm90 = 0;
  std::atomic<std::uint64_t> prepared_sage_sm90 = 0;
};

/// The device's, made at the first call for it. Throws std::runtime_error with CUDA's reason.
FlashDevice& flash_device(int device);

/// Lets a __global__ function have its shared memory, which is more than the default, once: `bit` is its own in
/// `prepared`. Throws std::runtime_error with CUDA's reason.
void prepare_flash(const void* function, int shared_bytes, int bit, std::atomic<std::uint64_t>& prepared);

}  // namespace ditattn::kernels::cuda
