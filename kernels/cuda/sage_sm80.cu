// Launches the quantized kernels for mma.sync.

#include "kernels/cuda/sage_sm80.hpp"

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/sage_sm80_impl.hpp"

namespace ditattn::kernels::cuda {

const SageSm80Kernel* find_sage_sm80(const AttentionProblem& problem) {
  for (const SageSm80Kernel& kernel : built_sage_sm80()) {
    if (kernel.type == problem.type && problem.head_size <= kernel.head_size) return &kernel;
  }
  return nullptr;
}

SageShape shape_of(const SageSm80Kernel& kernel, const SageQuantization& quantization) {
  return {.head = kernel.head_size,
          .channels = sage_channels(kernel.head_size),
          .keys = kSageSm80Keys,
          .wide_values = quantization.wide_values};
}

void launch_sage_sm80(const SageSm80Kernel& kernel, const AttentionProblem& p, const SageImages& images,
                      const SageQuantization& quantization, FlashDevice& device, void* stream) {
  SageSm80Arguments a{.problem = p, .images = images, .order = order_tiles(p, kernel.rows)};
  a.aligned_output = has_aligned_output(p);
  a.has_offsets = quantization.smooth_key && p.lse != nullptr && images.key_blocks[0] + images.key_blocks[1] != 0;
  const SageSm80Function* functions[] = {&kernel.wide, &kernel.bytes, &kernel.fp8};
  const int which = quantization.wide_values ? 0 : quantization.fp8_logits ? 2 : 1;
  const auto [function, shared_bytes] = *functions[which];
  const auto index = static_cast<int>(&kernel - built_sage_sm80().data());
  prepare_flash(function, shared_bytes, 3 * index + which, device.prepared_sage_sm80);
  void* pointers[] = {&a};
  check(cudaLaunchKernel(function, dim3(a.order.total_tiles), dim3(kSageSm80Threads), pointers,
                         static_cast<std::size_t>(shared_bytes), static_cast<cudaStream_t>(stream)),
        "sage_sm80");
}

}  // namespace ditattn::kernels::cuda
