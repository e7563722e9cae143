// Launches Hopper's exact kernel.

#include "kernels/cuda/flash_sm90.hpp"

#include "kernels/cuda/flash_layout.hpp"
#include "kernels/cuda/flash_sm90_impl.hpp"
#include "kernels/cuda/flash_sm90_tiles.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kGroupRows = 64;  // of a warpgroup

FlashSm90Arguments arguments_of(const AttentionProblem& p, const HopperTile& tile) {
  FlashSm90Arguments a{};
  a.problem = p;
  find_input_maps(a.query, a.key, a.value, p, kGroupRows, tile.keys);
  find_output_maps(a.out, p);
  a.order = order_tiles(p, kGroupRows * tile.warpgroups);
  a.hides = hides_keys(p);
  a.differs = differ_rows(p);
  return a;
}

}  // namespace

FlashSm90Choice choose_flash_sm90(const AttentionProblem& p, int multiprocessors) {
  const auto mapped = [](const void* data, const Extents& extents, const Strides& strides) {
    return can_map(data, extents.batch, extents.tokens, extents.heads, strides);
  };
  if (!all_inputs(p, mapped) || !can_map(p.out, p.batch, p.rows, p.heads, p.out_strides)) {
    return {.reason = "strides that are not positive, or from 2^40 bytes on"};
  }
  const HopperKernel* kernel = find_hopper_kernel(built_flash_sm90(), kFlashSm90Tiles, p, multiprocessors);
  if (kernel != nullptr) return {.kernel = kernel};
  return {.reason = "flash_sm90 was not compiled for this head size and dtype"};
}

void launch_flash_sm90(const HopperKernel& kernel, const AttentionProblem& p, FlashDevice& device, void* stream) {
  FlashSm90Arguments arguments = arguments_of(p, kernel.tile);
  launch_hopper(kernel, has_masks(p) ? 1 : 0, &arguments, arguments.order.total_tiles, device.multiprocessors,
                device.prepared_sm90, stream, "flash_sm90");
}

}  // namespace ditattn::kernels::cuda
