// Launches the kernels for mma.sync.

#include "kernels/cuda/flash_sm80.hpp"

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/flash_sm80_impl.hpp"

namespace ditattn::kernels::cuda {

const FlashSm80Kernel* find_flash_sm80(const AttentionProblem& problem) {
  for (const FlashSm80Kernel& kernel : built_flash_sm80()) {
    if (kernel.type == problem.type && problem.head_size <= kernel.head_size) return &kernel;
  }
  return nullptr;
}

void launch_flash_sm80(const FlashSm80Kernel& kernel, const AttentionProblem& p, FlashDevice& device, void* stream) {
  FlashSm80Arguments arguments{.problem = p, .order = order_tiles(p, kernel.rows), .hides = hides_keys(p)};
  const bool masked = has_masks(p);
  const void* function = kernel.functions[masked];
  const auto index = static_cast<int>(&kernel - built_flash_sm80().data());
  prepare_flash(function, kernel.shared_bytes, 2 * index + (masked ? 1 : 0), device.prepared_sm80);
  void* pointers[] = {&arguments};
  check(cudaLaunchKernel(function, dim3(arguments.order.total_tiles), dim3(kFlashSm80Threads), pointers,
                         static_cast<std::size_t>(kernel.shared_bytes), static_cast<cudaStream_t>(stream)),
        "flash_sm80");
}

}  // namespace ditattn::kernels::cuda
