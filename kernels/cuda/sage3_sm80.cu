// Launches SAGE_ATTN_3's kernels for mma.sync.

#include "kernels/cuda/sage3_sm80.hpp"

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/sage3_sm80_impl.hpp"

namespace ditattn::kernels::cuda {

const Sage3Sm80Kernel* find_sage3_sm80(const AttentionProblem& problem) {
  for (const Sage3Sm80Kernel& kernel : built_sage3_sm80()) {
    if (kernel.type == problem.type && problem.head_size <= kernel.head_size) return &kernel;
  }
  return nullptr;
}

void launch_sage3_sm80(const Sage3Sm80Kernel& kernel, const AttentionProblem& p, const Sage3Images& images,
                       bool adds_lse, FlashDevice& device, void* stream) {
  Sage3Sm80Arguments a{.problem = p,
                       .numbers = problem_of(p, images),
                       .images = images,
                       .order = order_tiles(p, kernel.rows),
                       .aligned_output = has_aligned_output(p),
                       .adds_lse = adds_lse};
  const auto index = static_cast<int>(&kernel - built_sage3_sm80().data());
  prepare_flash(kernel.function, kernel.shared_bytes, index, device.prepared_sage3_sm80);
  void* pointers[] = {&a};
  check(cudaLaunchKernel(kernel.function, dim3(a.order.total_tiles), dim3(kFlashSm80Threads), pointers,
                         static_cast<std::size_t>(kernel.shared_bytes), static_cast<cudaStream_t>(stream)),
        "sage3_sm80");
}

}  // namespace ditattn::kernels::cuda
