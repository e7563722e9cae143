// Q, K and V to 8 bits. Background: K's means and V's largest numbers are over all keys, so K and V are read twice, Q
// once. Approach: a launch that adds up chunks of K and V, one that quantizes Q while some of its blocks add up the
// chunks, and one that quantizes K and V; sums in a fixed order that follows from the lengths. Rejected: atomic sums,
// which differ from run to run; chunks added up by each block of keys, which waits for them longer than for its keys.

#include "kernels/cuda/sage_quantize.hpp"

#include <algorithm>

#include "kernels/cuda/flash_layout.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sage_quantize_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kMostChunks = 64;  // of a segment
constexpr int kLeastChunk = 256;

template <class... Parameters, class... Given>
void queue(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes, void* stream,
           const Given&... arguments) {
  const OverlappingLaunch launch(blocks, threads, shared_bytes, stream);
  check(cudaLaunchKernelEx(launch.config(), kernel, arguments...), "quantize_sage");
}

template <class T, int kLanes, bool kAligned>
void quantize(const Arguments& a, void* stream) {
  const AttentionProblem& p = a.problem;
  const SageImages& images = a.images;
  const std::int64_t query_tiles = (images.query_tiles[0] + images.query_tiles[1]) * p.heads * p.batch;
  const std::int64_t chunks = (images.chunks[0] + images.chunks[1]) * p.kv_heads * p.batch;
  const std::int64_t blocks = (images.key_blocks[0] + images.key_blocks[1]) * p.kv_heads * p.batch;
  if (std::max({query_tiles + p.kv_heads * p.batch, 2 * chunks, 2 * blocks}) > kFlashMostTokens) {
    throw std::runtime_error("sage_attention: more tiles than a launch takes. Split the batch.");
  }
  if (chunks != 0) {
    queue(add_up_chunks<T, kLanes, kAligned>, 2 * chunks, kThreads, 0, stream, a, static_cast<unsigned>(chunks));
  }
  const std::int64_t heads = p.kv_heads * p.batch;
  queue(quantize_queries<T, kLanes, kAligned>, heads + query_tiles, kThreads, 0, stream, a,
        static_cast<unsigned>(heads));
  if (blocks == 0) return;
  queue(quantize_keys<T, kLanes, kAligned>, 2 * blocks, images.shape.keys / kWarpRows * 32,
        images.shape.keys * kLanes * static_cast<int>(sizeof(Eight<T>)), stream, a, static_cast<unsigned>(blocks));
  if (p.lse == nullptr || !a.quantization.smooth_key) return;
  queue(offset_lse<T>, divide_up(p.batch * p.heads * p.rows, kWarps), kThreads, 0, stream, a);
}

template <class T, bool kAligned>
void quantize(const Arguments& a, void* stream) {
  switch (a.images.shape.channels) {
    case 64:
      return quantize<T, 8, kAligned>(a, stream);
    case 128:
      return quantize<T, 16, kAligned>(a, stream);
    case 256:
      return quantize<T, 32, kAligned>(a, stream);
  }
}

template <class T>
void quantize(const Arguments& a, void* stream) {
  const auto aligned = [](const void* data, const Extents& extents, const Strides& strides) {
    return extents.tokens == 0 || (is_aligned(data) && has_aligned_strides(extents, strides));
  };
  if (a.problem.head_size % 8 == 0 && all_inputs(a.problem, aligned)) return quantize<T, true>(a, stream);
  quantize<T, false>(a, stream);
}

}  // namespace

SageImages place_sage_images(const AttentionProblem& p, const SageShape& shape, char* memory) {
  SageImages images{.shape = shape};
  std::int64_t chunk = kLeastChunk;
  for (int i = 0; i < p.num_key_segments; ++i)
    chunk = std::max(chunk, divide_up(divide_up(p.key_segments[i].keys, kMostChunks), 128) * 128);
  images.chunk_keys = static_cast<int>(chunk);
  for (int i = 0; i < p.num_queries; ++i)
    images.query_tiles[i] = static_cast<int>(divide_up(rows_of(p, i), kSageQueryRows));
  for (int i = 0; i < p.num_key_segments; ++i) {
    images.key_blocks[i] = static_cast<int>(divide_up(p.key_segments[i].keys, shape.keys));
    images.chunks[i] = static_cast<int>(divide_up(p.key_segments[i].keys, chunk));
  }
  const std::int64_t tiles = (images.query_tiles[0] + images.query_tiles[1]) * p.heads * p.batch;
  const std::int64_t kv = p.kv_heads * p.batch;
  const std::int64_t blocks = (images.key_blocks[0] + images.key_blocks[1]) * kv;
  const std::int64_t chunks = (images.chunks[0] + images.chunks[1]) * kv;
  const auto place = [&]<class E>(E*& part, std::int64_t count) {
    part = memory == nullptr ? nullptr : reinterpret_cast<E*>(memory + images.bytes);
    images.bytes += divide_up(count * static_cast<std::int64_t>(sizeof(E)), 1024) * 1024;
  };
  place(images.query, tiles * kSageQueryRows * shape.channels);
  place(images.query_scale, tiles * kSageQueryRows);
  place(images.key, blocks * shape.keys * shape.channels);
  place(images.key_scale, blocks * kSageKeyGroups);
  const bool masked = has_masks(p);
  place(images.key_bits, masked ? blocks * (shape.keys / 32) : 0);
  place(images.value, blocks * shape.keys * shape.head);
  place(images.value_scale, kv * shape.channels);
  place(images.value_mean, kv * shape.channels);
  place(images.key_mean, kv * shape.channels);
  place(images.key_sums, chunks * shape.channels);
  place(images.key_counts, chunks);
  place(images.value_sums, chunks * 3 * shape.channels);
  place(images.seen, p.ranges != nullptr ? 2 * p.batch : 0);
  return images;
}

void quantize_sage(const AttentionProblem& problem, const SageQuantization& quantization, const SageImages& images,
                   const Launch& launch) {
  const Arguments arguments{.problem = problem, .quantization = quantization, .images = images};
  if (problem.ranges != nullptr) queue(find_seen, problem.batch, 256, 0, launch.stream, arguments);
  if (problem.type == ElementType::bfloat16) return quantize<__nv_bfloat16>(arguments, launch.stream);
  quantize<__half>(arguments, launch.stream);
}

}  // namespace ditattn::kernels::cuda
