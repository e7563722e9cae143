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

constexpr int kGroupRows = 64;  // of a warpgroup
constexpr std::int64_t kElementBytes = 2;
constexpr std::int64_t kAlignment = 16;                               // bytes, of a map's start and strides
constexpr std::int64_t kMostBytes = std::int64_t{1} << 40;            // a map's strides are below
constexpr std::int64_t kMostTokens = (std::int64_t{1} << 31) - 1024;  // counted in int32, some beyond the end
constexpr float kLeastScale = 1e-20F;  // the largest product is taken for the largest logit; masks are divided by it

bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kAlignment == 0; }

// What a map says of a tensor (batch, tokens, heads, head_size).
struct Extents {
  std::int64_t batch;
  std::int64_t tokens;
  std::int64_t heads;
};

// Distances along axes of one element are never used.
bool is_multiple(std::int64_t extent, std::int64_t stride) {
  return extent <= 1 || stride * kElementBytes % kAlignment == 0;
}
bool has_aligned_strides(const Extents& extents, const Strides& strides) {
  return is_multiple(extents.batch, strides.batch) && is_multiple(extents.tokens, strides.token) &&
         is_multiple(extents.heads, strides.head);
}

bool is_mapped(std::int64_t extent, std::int64_t stride) {
  return extent <= 1 || (stride > 0 && stride < kMostBytes / kElementBytes);
}
bool can_map(const void* data, const Extents& extents, const Strides& strides) {
  return extents.tokens == 0 ||
         (is_aligned(data) && has_aligned_strides(extents, strides) && is_mapped(extents.batch, strides.batch) &&
          is_mapped(extents.tokens, strides.token) && is_mapped(extents.heads, strides.head));
}

std::int64_t rows_of(const AttentionProblem& p, int segment) {
  const bool last = segment + 1 == p.num_queries;
  return (last ? p.rows : p.queries[segment + 1].first_row) - p.queries[segment].first_row;
}
Extents queries_of(const AttentionProblem& p, int segment) { return {p.batch, rows_of(p, segment), p.heads}; }
Extents keys_of(const AttentionProblem& p, int segment) { return {p.batch, p.key_segments[segment].keys, p.kv_heads}; }

bool can_map_all(const AttentionProblem& p) {
  for (int i = 0; i < p.num_queries; ++i) {
    if (!can_map(p.queries[i].data, queries_of(p, i), p.queries[i].strides)) return false;
  }
  for (int i = 0; i < p.num_key_segments; ++i) {
    const KeySegment& segment = p.key_segments[i];
    if (!can_map(segment.key, keys_of(p, i), segment.key_strides)) return false;
    if (!can_map(segment.value, keys_of(p, i), segment.value_strides)) return false;
  }
  return true;
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
    return static_cast<cuuint64_t>(extent == 1 ? kAlignment : stride * kElementBytes);
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

bool has_masks(const AttentionProblem& p) {
  return std::any_of(p.key_segments, p.key_segments + p.num_key_segments,
                     [](const KeySegment& segment) { return segment.mask.data != nullptr; });
}

// Whether rows may see different keys: only where they do not, sums do not depend on which rows are in a tile.
bool differ_rows(const AttentionProblem& p) { return p.causal || p.ranges != nullptr || has_masks(p); }

bool hides_keys(const AttentionProblem& p) {
  return differ_rows(p) || std::any_of(p.key_segments, p.key_segments + p.num_key_segments,
                                       [](const KeySegment& segment) { return segment.lengths != nullptr; });
}

std::int64_t divide_up(std::int64_t x, std::int64_t by) { return (x + by - 1) / by; }

FlashSm90Arguments arguments_of(const AttentionProblem& p, const FlashSm90Tile& tile) {
  const int rows = kGroupRows * tile.warpgroups;
  FlashSm90Arguments a{};
  a.problem = p;
  std::int64_t tiles[2] = {};
  for (int i = 0; i < p.num_queries; ++i) {
    encode(a.query[i], p, p.queries[i].data, queries_of(p, i), p.queries[i].strides, kGroupRows);
    tiles[i] = divide_up(rows_of(p, i), rows);
  }
  for (int i = 0; i < p.num_key_segments; ++i) {
    const KeySegment& segment = p.key_segments[i];
    encode(a.key[i], p, segment.key, keys_of(p, i), segment.key_strides, tile.keys);
    encode(a.value[i], p, segment.value, keys_of(p, i), segment.value_strides, tile.keys);
  }
  const std::int64_t head_tiles = tiles[0] + tiles[1];
  const std::int64_t total = head_tiles * p.heads * p.batch;
  if (total > kMostTokens) {
    throw std::runtime_error("flash_attention: " + std::to_string(total) + " tiles of " + std::to_string(rows) +
                             " rows; a launch takes at most " + std::to_string(kMostTokens) + ". Split the batch.");
  }
  a.first_tiles = static_cast<unsigned>(tiles[0]);
  a.head_tiles = static_cast<unsigned>(head_tiles);
  a.total_tiles = static_cast<unsigned>(total);
  a.heads = static_cast<unsigned>(p.heads);
  a.group = static_cast<unsigned>(p.heads / p.kv_heads);
  a.longest_first = p.causal || p.ranges != nullptr;
  a.hides = hides_keys(p);
  return a;
}

// Lets a function have its shared memory, which is more than the default.
void prepare(const FlashSm90Kernel& kernel, bool masked, FlashDevice& device) {
  const auto index = 2 * (&kernel - built_flash_sm90().data()) + (masked ? 1 : 0);
  const std::uint64_t bit = std::uint64_t{1} << index;
  if ((device.prepared & bit) != 0) return;
  check(
      cudaFuncSetAttribute(kernel.functions[masked], cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes),
      "cudaFuncSetAttribute");
  device.prepared |= bit;
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
  if (p.type == ElementType::float32) return {.reason = "float32"};
  const FlashSm90Tile* tile = find_tile(p, multiprocessors);
  if (tile == nullptr) return {.reason = "a head size above 256"};
  if (!(p.scale > kLeastScale)) return {.reason = "a scale of 1e-20 or less"};
  if (std::max({p.batch, p.heads, p.rows, p.keys}) > kMostTokens) return {.reason = "2^31 rows, keys or heads"};
  if (p.head_size % (kAlignment / kElementBytes) != 0 || !is_aligned(p.out) ||
      !has_aligned_strides({p.batch, p.rows, p.heads}, p.out_strides) || !can_map_all(p)) {
    return {.reason = "a head size, starts or strides that are not positive multiples of 16 bytes"};
  }
  for (const FlashSm90Kernel& kernel : built_flash_sm90()) {
    const FlashSm90Tile& its = kernel.tile;
    if (kernel.type == p.type && its.head_size == tile->head_size && its.keys == tile->keys &&
        its.warpgroups == tile->warpgroups) {
      return {.kernel = &kernel};
    }
  }
  return {.reason = "flash_sm90 was not compiled for this head size and dtype"};
}

void launch_flash_sm90(const FlashSm90Kernel& kernel, const AttentionProblem& p, FlashDevice& device, void* stream) {
  FlashSm90Arguments arguments = arguments_of(p, kernel.tile);
  const bool masked = has_masks(p);
  prepare(kernel, masked, device);
  const unsigned blocks = std::min(arguments.total_tiles, static_cast<unsigned>(device.multiprocessors));
  void* pointers[] = {&arguments};
  check(cudaLaunchKernel(kernel.functions[masked], dim3(blocks), dim3(static_cast<unsigned>(kernel.threads)), pointers,
                         static_cast<std::size_t>(kernel.shared_bytes), static_cast<cudaStream_t>(stream)),
        "flash_sm90");
}

}  // namespace ditattn::kernels::cuda
