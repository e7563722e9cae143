// Where the images of a problem lie.

#include "kernels/cuda/sage_images.hpp"

#include "kernels/cuda/flash_layout.hpp"

namespace ditattn::kernels::cuda {

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
  place(images.value, blocks * shape.keys * shape.head * (shape.wide_values ? 2 : 1));
  place(images.value_scale, kv * shape.channels);
  place(images.value_mean, kv * shape.channels);
  place(images.key_mean, kv * shape.channels);
  place(images.seen, p.ranges != nullptr ? 2 * p.batch : 0);
  place(images.totals, 2 * kv * kSageMostStretches * shape.channels);
  place(images.total_keys, 2 * kv * kSageMostStretches);
  return images;
}

}  // namespace ditattn::kernels::cuda
