// Launches Hopper's kernel. Background: its blocks are copied by the tensor memory accelerator, which needs a
// description (a map) of each tensor. Approach: maps are encoded at every call, on the stack. Rejected: keeping them,
// as tensors move from call to call.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/flash_sm90.hpp"
#include "kernels/cuda/flash_sm90_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kGroupRows = 64;                              // of a warpgroup
constexpr std::int64_t kMostBytes = std::int64_t{1} << 40;  // a map's strides are below

bool can_map(const void*, const Extents& extents, const Strides& strides) {
  const auto is_mapped = [](std::int64_t extent, std::int64_t stride) {
    return extent <= 1 || (stride > 0 && stride < kMostBytes / kFlashElementBytes);
  };
  return extents.tokens == 0 || (is_mapped(extents.batch, strides.batch) && is_mapped(extents.tokens, strides.token) &&
                                 is_mapped(extents.heads, strides.head));
}

using EncodeMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which CUDA's runtime does not have.
EncodeMap encode_map() {
  static const auto function = [] {
    constexpr unsigned oldest = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, oldest, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (found == nullptr) {
      throw std::runtime_error("The NVIDIA driver has no cuTensorMapEncodeTiled: 525, for CUDA 12.0, is the oldest.");
    }
    return reinterpret_cast<EncodeMap>(found);
  }();
  return function;
}

// Boxes of 64 channels of `box_tokens`, in 128 swizzled bytes each; zeros past the ends.
void encode(CUtensorMap& map, const AttentionProblem& p, const void* data, const Extents& extents,
            const Strides& strides, int box_tokens) {
  if (extents.tokens == 0) return;  // no block is of this one
  const auto bytes = [](std::int64_t extent, std::int64_t stride) {
    return static_cast<cuuint64_t>(extent == 1 ? kFlashAlignment : stride * kFlashElementBytes);
  };
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(p.head_size), static_cast<cuuint64_t>(extents.tokens),
                              static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  const cuuint64_t distances[] = {bytes(extents.tokens, strides.token), bytes(extents.heads, strides.head),
                                  bytes(extents.batch, strides.batch)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_tokens), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result = encode_map()(
      &map, p.type == ElementType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(data), sizes, distances, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(static_cast<cudaError_t>(result), "cuTensorMapEncodeTiled");  // both count their errors alike
}

FlashSm90Arguments arguments_of(const AttentionProblem& p, const FlashSm90Tile& tile) {
  FlashSm90Arguments a{};
  a.problem = p;
  for (int i = 0; i < p.num_queries; ++i) {
    encode(a.query[i], p, p.queries[i].data, queries_of(p, i), p.queries[i].strides, kGroupRows);
  }
  for (int i = 0; i < p.num_key_segments; ++i) {
    const KeySegment& segment = p.key_segments[i];
    encode(a.key[i], p, segment.key, keys_of(p, i), segment.key_strides, tile.keys);
    encode(a.value[i], p, segment.value, keys_of(p, i), segment.value_strides, tile.keys);
  }
  a.order = order_tiles(p, kGroupRows * tile.warpgroups);
  a.hides = hides_keys(p);
  return a;
}

// The tile of a problem; null above the largest head size.
const FlashSm90Tile* find_tile(const AttentionProblem& p, int multiprocessors) {
  const bool few = !differ_rows(p) && divide_up(p.rows, kGroupRows) * p.heads * p.batch <= multiprocessors;
  const FlashSm90Tile* found = nullptr;
  for (const FlashSm90Tile& tile : kFlashSm90Tiles) {
    if (tile.head_size < p.head_size || tile.least_keys > p.keys || (tile.few_rows && !few)) continue;
    if (found != nullptr && found->head_size < tile.head_size) break;
    if (found == nullptr || !tile.few_rows || tile.keys == found->keys) found = &tile;
  }
  return found;
}

}  // namespace

FlashSm90Choice choose_flash_sm90(const AttentionProblem& p, int multiprocessors) {
  if (!all_inputs(p, can_map)) return {.reason = "strides that are not positive, or from 2^40 bytes on"};
  const FlashSm90Tile* tile = find_tile(p, multiprocessors);
  for (const FlashSm90Kernel& kernel : built_flash_sm90()) {
    const FlashSm90Tile& its = kernel.tile;
    if (tile != nullptr && kernel.type == p.type && its.head_size == tile->head_size && its.keys == tile->keys &&
        its.warpgroups == tile->warpgroups) {
      return {.kernel = &kernel};
    }
  }
  return {.reason = "flash_sm90 was not compiled for this head size and dtype"};
}

void launch_flash_sm90(const FlashSm90Kernel& kernel, const AttentionProblem& p, FlashDevice& device, void* stream) {
  FlashSm90Arguments arguments = arguments_of(p, kernel.tile);
  const bool masked = has_masks(p);
  const auto index = static_cast<int>(&kernel - built_flash_sm90().data());
  prepare_flash(kernel.functions[masked], kernel.shared_bytes, 2 * index + (masked ? 1 : 0), device.prepared_sm90);
  const unsigned blocks = std::min(arguments.order.total_tiles, static_cast<unsigned>(device.multiprocessors));
  void* pointers[] = {&arguments};
  check(cudaLaunchKernel(kernel.functions[masked], dim3(blocks), dim3(static_cast<unsigned>(kernel.threads)), pointers,
                         static_cast<std::size_t>(kernel.shared_bytes), static_cast<cudaStream_t>(stream)),
        "flash_sm90");
}

}  // namespace ditattn::kernels::cuda
