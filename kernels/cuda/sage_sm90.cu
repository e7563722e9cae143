// Launches Hopper's quantized kernel.

#include "kernels/cuda/sage_sm90.hpp"

#include "kernels/cuda/flash_layout.hpp"
#include "kernels/cuda/sage_sm90_impl.hpp"
#include "kernels/cuda/sage_sm90_tiles.hpp"

namespace ditattn::kernels::cuda {

const HopperKernel* choose_sage_sm90(const AttentionProblem& problem, int multiprocessors) {
  return find_hopper_kernel(built_sage_sm90(), kSageSm90Tiles, problem, multiprocessors);
}

SageShape shape_of(const HopperKernel& kernel) {
  const int head = kernel.tile.head_size;
  return {.head = head, .channels = sage_channels(head), .keys = kernel.tile.keys};
}

void launch_sage_sm90(const HopperKernel& kernel, const AttentionProblem& p, const SageImages& images,
                      const SageQuantization& quantization, FlashDevice& device, void* stream) {
  SageSm90Arguments a{};
  a.maps_output = maps_output(p);
  if (a.maps_output) find_output_maps(a.out, p);
  a.problem = p;
  a.images = images;
  a.order = order_tiles(p, kSageQueryRows * kernel.tile.warpgroups);
  a.differs = differ_rows(p);
  a.has_offsets = quantization.smooth_key && p.lse != nullptr && images.key_blocks[0] + images.key_blocks[1] != 0;
  launch_hopper(kernel, quantization.fp8_logits ? 1 : 0, &a, a.order.total_tiles, device.multiprocessors, device.prepared_sage_sm90, stream,
                "sage_sm90");
}

}  // namespace ditattn::kernels::cuda
