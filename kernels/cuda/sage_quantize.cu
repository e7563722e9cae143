// Q, K and V to 8 bits. Background: K's means and V's largest numbers are over all keys, so K and V are read twice, Q
// once. Approach: one launch; a cluster of blocks of threads has K or V of a head, adds it up, and quantizes it when
// all of them have; those that have Q fill what they leave. Sums are of stretches of keys, in an order that follows
// from the lengths alone. Rejected: atomic sums, which differ from run to run; three launches, for sums, sums of those,
// and numbers, which leave the device idle between them; Q in a launch beside (4 to 10 % slower).

#include "kernels/cuda/sage_quantize.hpp"

#include <algorithm>
#include <bit>

#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/flash_layout.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/sage_quantize_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kMostRanks = 8;  // of a cluster, on any GPU

void queue(void (*kernel)(Arguments), const OverlappingLaunch& launch, const Arguments& arguments) {
  check(cudaLaunchKernelEx(launch.config(), kernel, arguments), "quantize_sage");
}

template <class T, int kLanes, int kKeys, bool kAligned>
void quantize(Arguments a, int multiprocessors, void* stream) {
  const AttentionProblem& p = a.problem;
  const SageImages& images = a.images;
  const std::int64_t key_blocks = images.key_blocks[0] + images.key_blocks[1];
  const std::int64_t heads = key_blocks == 0 ? 0 : p.kv_heads * p.batch;
  a.heads = static_cast<unsigned>(heads);
  a.stretches = a.ranks = static_cast<unsigned>(std::bit_floor(std::clamp<std::uint64_t>(key_blocks, 1, kMostRanks)));
  // Where those of K and V are many, Q's find no place among them: half as many do better.
  const std::int64_t places = std::int64_t{multiprocessors} * kBlocksAtOnce<kLanes, kKeys>;
  if (a.ranks == kMostRanks && 2 * heads * a.ranks * 5 > 6 * places) a.ranks /= kMostStretches;
  constexpr int threads = kBlockThreads<kLanes>;
  constexpr int shared_bytes = threads / 2 * kLanes * static_cast<int>(sizeof(Eight<T>));  // 16 tokens a warp
  const std::int64_t tiles = (images.query_tiles[0] + images.query_tiles[1]) * p.heads * p.batch;
  const std::int64_t clusters = 2 * heads + divide_up(tiles, threads / kThreads * std::int64_t{a.ranks});
  if (clusters * a.ranks > kFlashMostTokens) {
    throw std::runtime_error("sage_attention: more tiles than a launch takes. Split the batch.");
  }
  queue(quantize_all<T, kLanes, kKeys, kAligned>, {clusters * a.ranks, threads, shared_bytes, stream, a.ranks}, a);
  if (p.lse == nullptr || !a.quantization.smooth_key || heads == 0) return;
  queue(offset_lse<T>, {divide_up(p.batch * p.heads * p.rows, kThreads / 32), kThreads, 0, stream}, a);
}

template <class T, bool kAligned>
void quantize(const Arguments& a, int multiprocessors, void* stream) {
  const auto is = [&](int channels, int keys) {
    return a.images.shape.channels == channels && a.images.shape.keys == keys;
  };
  if (is(64, 128)) return quantize<T, 8, 128, kAligned>(a, multiprocessors, stream);
  if (is(128, 128)) return quantize<T, 16, 128, kAligned>(a, multiprocessors, stream);
  if (is(128, 64)) return quantize<T, 16, 64, kAligned>(a, multiprocessors, stream);
  if (is(256, 64)) return quantize<T, 32, 64, kAligned>(a, multiprocessors, stream);
  throw std::logic_error("quantize_sage: a kernel's blocks are of another size than any here.");
}

template <class T>
void quantize(const Arguments& a, int multiprocessors, void* stream) {
  const auto aligned = [](const void* data, const Extents& extents, const Strides& strides) {
    return extents.tokens == 0 || (is_aligned(data) && has_aligned_strides(extents, strides));
  };
  if (a.problem.head_size % 8 == 0 && all_inputs(a.problem, aligned)) {
    return quantize<T, true>(a, multiprocessors, stream);
  }
  quantize<T, false>(a, multiprocessors, stream);
}

}  // namespace

SageImages place_sage_images(const AttentionProblem& p, const SageShape& shape, char* memory) {
  SageImages images{.shape = shape};
  for (int i = 0; i < p.num_queries; ++i)
    images.query_tiles[i] = static_cast<int>(divide_up(rows_of(p, i), kSageQueryRows));
  for (int i = 0; i < p.num_key_segments; ++i) {
    images.key_blocks[i] = static_cast<int>(divide_up(p.key_segments[i].keys, shape.keys));
  }
  const std::int64_t tiles = (images.query_tiles[0] + images.query_tiles[1]) * p.heads * p.batch;
  const std::int64_t kv = p.kv_heads * p.batch;
  const std::int64_t blocks = (images.key_blocks[0] + images.key_blocks[1]) * kv;
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
  place(images.seen, p.ranges != nullptr ? 2 * p.batch : 0);
  return images;
}

void quantize_sage(const AttentionProblem& problem, const SageQuantization& quantization, const SageImages& images,
                   const Launch& launch) {
  const Arguments arguments{.problem = problem, .quantization = quantization, .images = images};
  if (problem.ranges != nullptr) queue(find_seen, {problem.batch, 256, 0, launch.stream}, arguments);
  const int multiprocessors = flash_device(launch.device).multiprocessors;
  if (problem.type == ElementType::bfloat16) return quantize<__nv_bfloat16>(arguments, multiprocessors, launch.stream);
  quantize<__half>(arguments, multiprocessors, launch.stream);
}

}  // namespace ditattn::kernels::cuda
