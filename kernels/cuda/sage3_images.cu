// Where the images of a problem lie.

#include "kernels/cuda/sage3_images.hpp"

#include <algorithm>

#include "kernels/cuda/flash_layout.hpp"
#include "kernels/sage3_fp4_layout.hpp"

namespace ditattn::kernels::cuda {

Sage3Images place_sage3_images(const AttentionProblem& p, char* memory, bool packed) {
  const int step = packed ? fp4::kStep : kNvfp4Group;
  Sage3Images images{.packed = packed, .channels = static_cast<int>(divide_up(p.head_size, step) * step)};
  for (int i = 0; i < p.num_key_segments; ++i) {
    images.key_blocks[i] = static_cast<int>(divide_up(p.key_segments[i].keys, kSage3Keys));
  }
  const std::int64_t rows = p.batch * p.heads * p.rows;
  const std::int64_t blocks = p.batch * p.kv_heads * images.blocks();
  const std::int64_t sources = p.batch * (2 * p.kv_heads + p.heads);
  const std::int64_t tokens = std::max<std::int64_t>(p.rows, std::int64_t{images.blocks()} * kSage3Keys);
  images.stretches = static_cast<int>(std::clamp<std::int64_t>(divide_up(tokens, 512), 1, kSage3MostStretches));
  const auto place = [&]<class E>(E*& part, std::int64_t bytes) {
    part = memory == nullptr ? nullptr : reinterpret_cast<E*>(memory + images.bytes);
    images.bytes += divide_up(bytes, 256) * 256;
  };
  const std::int64_t row_bytes = packed ? images.channels / 2 : images.channels * kFlashElementBytes;
  const std::int64_t row_groups = packed ? images.channels / kNvfp4Group : 0;
  place(images.query, rows * row_bytes);
  place(images.query_groups, rows * row_groups);
  place(images.query_scale, rows * 4);
  for (void** part : {&images.key, &images.value}) place(*part, blocks * kSage3Keys * row_bytes);
  for (std::uint8_t** part : {&images.key_groups, &images.value_groups}) place(*part, blocks * kSage3Keys * row_groups);
  place(images.records, p.batch * p.heads * images.blocks() * kSage3Record * 4);
  place(images.key_bits, has_masks(p) ? p.batch * images.blocks() * (kSage3Keys / 8) : 0);
  place(images.means, sources * images.channels * 4);
  place(images.totals, sources * images.stretches * images.channels * static_cast<std::int64_t>(sizeof(Sage3Total)));
  place(images.total_tokens, sources * images.stretches * 4);
  place(images.seen, p.ranges != nullptr ? 16 * p.batch : 0);
  return images;
}

AttentionProblem problem_of(const AttentionProblem& p, const Sage3Images& images) {
  AttentionProblem result = p;
  result.head_size = images.channels;
  const auto advance = [&](void* data, std::int64_t tokens) {
    return static_cast<const void*>(static_cast<char*>(data) + tokens * images.channels * kFlashElementBytes);
  };
  const auto strides_of = [&](std::int64_t heads, std::int64_t tokens) {
    return Strides{.batch = heads * tokens * images.channels, .token = images.channels, .head = tokens * images.channels};
  };
  for (int i = 0; i < p.num_queries; ++i) {
    result.queries[i].data = advance(images.query, p.queries[i].first_row);
    result.queries[i].strides = strides_of(p.heads, p.rows);
  }
  for (int i = 0; i < p.num_key_segments; ++i) {
    KeySegment& segment = result.key_segments[i];
    const std::int64_t first = i == 0 ? 0 : std::int64_t{images.key_blocks[0]} * kSage3Keys;
    segment.keys = std::int64_t{images.key_blocks[i]} * kSage3Keys;
    segment.key = advance(images.key, first);
    segment.value = advance(images.value, first);
    segment.key_strides = segment.value_strides = strides_of(p.kv_heads, std::int64_t{images.blocks()} * kSage3Keys);
  }
  return result;
}

}  // namespace ditattn::kernels::cuda
