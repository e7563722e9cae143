// Launches Hopper's kernel for SAGE_ATTN_3.

#include "kernels/cuda/sage3_sm90.hpp"

#include "kernels/cuda/flash_layout.hpp"
#include "kernels/cuda/sage3_sm90_impl.hpp"
#include "kernels/cuda/sage3_sm90_tiles.hpp"

namespace ditattn::kernels::cuda {

const HopperKernel* choose_sage3_sm90(const AttentionProblem& problem, int multiprocessors) {
  return find_hopper_kernel(built_sage3_sm90(), kSage3Sm90Tiles, problem, multiprocessors);
}

void launch_sage3_sm90(const HopperKernel& kernel, const AttentionProblem& p, const Sage3Images& images, bool adds_lse,
                       FlashDevice& device, void* stream) {
  constexpr int group_rows = 64;  // of a warpgroup
  Sage3Sm90Arguments a{};
  a.maps_output = maps_output(p);
  if (a.maps_output) find_output_maps(a.out, p);
  find_input_maps(a.query, a.key, a.value, problem_of(p, images), group_rows, kernel.tile.keys);
  a.problem = p;
  a.images = images;
  a.order = order_tiles(p, group_rows * kernel.tile.warpgroups);
  a.differs = differ_rows(p);
  a.adds_lse = adds_lse;
  launch_hopper(kernel, 0, &a, a.order.total_tiles, device.multiprocessors, device.prepared_sage3_sm90, stream,
                "sage3_sm90");
}

}  // namespace ditattn::kernels::cuda
