// Launches Hopper's kernel. Background: its blocks are copied by the tensor memory accelerator, which needs a
// description (a map) of each tensor, 0.1 µs of the driver's. Approach: each thread keeps the last ones, as allocators
// give layers the same addresses again; they say nothing but where a tensor lies. Rejected: one store for all threads.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <string>

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/flash_sm90.hpp"
#include "kernels/cuda/flash_sm90_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kWarpRows = 16;
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

// What a map is made of: where a (channel, token, head, batch) tensor lies, and the boxes it is copied in: 64 channels
// of `box_tokens`, in 128 swizzled bytes each; zeros past the ends.
struct MapSource {
  std::uintptr_t data = 0;
  std::array<std::int64_t, 4> sizes{};
  std::array<std::int64_t, 3> distances{};  // bytes
  ElementType type{};
  int box_tokens = 0;
  bool operator==(const MapSource&) const = default;
};

CUtensorMap encode(const MapSource& source) {
  CUtensorMap map;
  std::array<cuuint64_t, 4> sizes{};
  std::array<cuuint64_t, 3> distances{};
  std::copy(source.sizes.begin(), source.sizes.end(), sizes.begin());
  std::copy(source.distances.begin(), source.distances.end(), distances.begin());
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(source.box_tokens), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result = encode_map()(
      &map, source.type == ElementType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, reinterpret_cast<void*>(source.data), sizes.data(), distances.data(), box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(static_cast<cudaError_t>(result), "cuTensorMapEncodeTiled");  // both count their errors alike
  return map;
}

// The map of a tensor that has tokens; a thread's last ones are kept.
void find_map(CUtensorMap& map, const AttentionProblem& p, const void* data, const Extents& extents,
              const Strides& strides, int box_tokens) {
  if (extents.tokens == 0) return;  // no block is of this one
  const auto bytes = [](std::int64_t extent, std::int64_t stride) {
    return extent == 1 ? kFlashAlignment : stride * kFlashElementBytes;
  };
  const MapSource source{.data = reinterpret_cast<std::uintptr_t>(data),
                         .sizes = {p.head_size, extents.tokens, extents.heads, extents.batch},
                         .distances = {bytes(extents.tokens, strides.token), bytes(extents.heads, strides.head),
                                       bytes(extents.batch, strides.batch)},
                         .type = p.type,
                         .box_tokens = box_tokens};
  struct Kept {
    MapSource source;
    CUtensorMap map;
  };
  static thread_local std::array<Kept, 64> kept;
  const std::uintptr_t mixed = (source.data >> 4) * 0x9E3779B97F4A7C15U;
  Kept& place = kept[(mixed >> 32 ^ static_cast<unsigned>(box_tokens)) % kept.size()];
  if (place.source != source) {
    place.map = encode(source);  // may throw
    place.source = source;
  }
  map = place.map;
}

FlashSm90Arguments arguments_of(const AttentionProblem& p, const FlashSm90Tile& tile) {
  FlashSm90Arguments a{};
  a.problem = p;
  for (int i = 0; i < p.num_queries; ++i) {
    const QuerySegment& segment = p.queries[i];
    find_map(a.query[i], p, segment.data, queries_of(p, i), segment.strides, kGroupRows);
    char* out = static_cast<char*>(p.out) + segment.first_row * p.out_strides.token * kFlashElementBytes;
    find_map(a.out[i], p, out, queries_of(p, i), p.out_strides, kWarpRows);
  }
  for (int i = 0; i < p.num_key_segments; ++i) {
    const KeySegment& segment = p.key_segments[i];
    find_map(a.key[i], p, segment.key, keys_of(p, i), segment.key_strides, tile.keys);
    find_map(a.value[i], p, segment.value, keys_of(p, i), segment.value_strides, tile.keys);
  }
  a.order = order_tiles(p, kGroupRows * tile.warpgroups);
  a.hides = hides_keys(p);
  a.differs = differ_rows(p);
  return a;
}

// The tile of a problem; null above the largest head size. Of those of the same blocks, the one that is done first,
// where blocks are the same whatever rows are in a tile: multiprocessors work through as many tiles each as any of
// them.
const FlashSm90Tile* find_tile(const AttentionProblem& p, int multiprocessors) {
  const auto time = [&](const FlashSm90Tile& tile) {
    return divide_up(count_tiles(p, kGroupRows * tile.warpgroups), multiprocessors) * tile.warpgroups *
           tile.row_percent;
  };
  const FlashSm90Tile* found = nullptr;
  for (const FlashSm90Tile& tile : kFlashSm90Tiles) {
    if (tile.head_size < p.head_size) continue;
    if (found != nullptr && (found->head_size < tile.head_size || differ_rows(p))) break;
    if (found == nullptr || time(tile) < time(*found)) found = &tile;
  }
  return found;
}

}  // namespace

FlashSm90Choice choose_flash_sm90(const AttentionProblem& p, int multiprocessors) {
  if (!all_inputs(p, can_map) || !can_map(p.out, {p.batch, p.rows, p.heads}, p.out_strides)) {
    return {.reason = "strides that are not positive, or from 2^40 bytes on"};
  }
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
  prepare_flash(kernel.functions[masked], kernel.shared_bytes, 2 * kernel.place + (masked ? 1 : 0),
                device.prepared_sm90);
  const unsigned blocks = std::min(arguments.order.total_tiles, static_cast<unsigned>(device.multiprocessors));
  void* pointers[] = {&arguments};
  // Blocks may start under the end of the kernel before: flash_sm90 waits for its results itself.
  cudaLaunchAttribute overlaps{};
  overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlaps.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(kernel.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlaps;
  config.numAttrs = 1;
  check(cudaLaunchKernelExC(&config, kernel.functions[masked], pointers), "flash_sm90");
}

}  // namespace ditattn::kernels::cuda
