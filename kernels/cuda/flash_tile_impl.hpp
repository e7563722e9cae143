#pragma once

/// What a tile of query rows is and sees, for the kernels on matrix units: a thread has two rows' elements, as
/// mma.m16n8k16 and wgmma lay out sums: element 4 · j + 2 · i + c is row lane / 4 + 8 · i, column 8 · j + 2 · (lane %
/// 4) + c. Included by .cu files alone.

#include "kernels/cuda/flash_layout.hpp"
#include "kernels/cuda/mask_impl.hpp"

namespace ditattn::kernels::cuda {

constexpr float kLog2E = 1.44269504F;
constexpr float kLn2 = 0.693147181F;
constexpr unsigned kWarp = 0xFFFFFFFFU;

/// Rows of one query segment of one head.
struct Tile {
  int batch;
  int head;
  int kv_head;
  int segment;
  int row;        ///< in its segment
  int first_row;  ///< among all rows
  int rows;
};

/// A head's tiles are neighbours, so that blocks of threads that run at the same time read its K and V from the cache.
/// Where rows see different numbers of keys, the longest tiles of all heads come first.
template <int kRows>
__device__ Tile tile_at(const AttentionProblem& p, const TileOrder& order, unsigned index) {
  unsigned head = index / order.head_tiles;
  unsigned in_head = index - head * order.head_tiles;
  if (order.longest_first) {
    const unsigned all_heads = order.total_tiles / order.head_tiles;
    in_head = order.head_tiles - 1 - index / all_heads;
    head = index % all_heads;
  }
  const bool second = p.num_queries == 2 && in_head >= order.first_tiles;
  const unsigned batch = head / order.heads;
  const unsigned of_batch = head - batch * order.heads;
  Tile tile;
  tile.batch = static_cast<int>(batch);
  tile.head = static_cast<int>(of_batch);
  tile.kv_head = static_cast<int>(of_batch / order.group);
  tile.segment = second ? 1 : 0;
  tile.row = static_cast<int>(second ? in_head - order.first_tiles : in_head) * kRows;
  const int end = static_cast<int>(!second && p.num_queries == 2 ? p.queries[1].first_row : p.rows);
  tile.first_row = static_cast<int>(p.queries[tile.segment].first_row) + tile.row;
  tile.rows = min(kRows, end - tile.first_row);
  return tile;
}

/// Keys of a segment: all that rows of a tile see are in [begin, end); all of its rows see [full_begin, full_end).
struct SeenKeys {
  int begin;
  int end;
  int full_begin;
  int full_end;
};

/// What [begin, end) of a segment row `row` sees, masks aside.
__device__ inline int2 keys_of_row(const AttentionProblem& p, const KeySegment& segment, int batch, int row) {
  std::int64_t length = segment.keys;
  if (segment.lengths != nullptr) {
    length = clamp(segment.lengths[batch * segment.length_stride] - segment.length_offset, 0, length);
  }
  std::int64_t begin = 0;
  std::int64_t end = length;
  if (p.ranges != nullptr) {
    const std::int64_t* range = p.ranges + batch * p.range_batch_stride + 2 * static_cast<std::int64_t>(row);
    begin = clamp(range[0] - segment.first_key, 0, length);
    end = clamp(range[1] - segment.first_key, 0, length);
  } else if (p.causal) {
    end = clamp(row + p.causal_offset + 1 - segment.first_key, 0, length);
  }
  return begin < end ? make_int2(static_cast<int>(begin), static_cast<int>(end)) : make_int2(0, 0);
}

/// Takes a whole warp, and gives all of its threads the same.
__device__ inline SeenKeys find_seen(const AttentionProblem& p, const KeySegment& segment, const Tile& tile) {
  if (!p.causal && p.ranges == nullptr && segment.lengths == nullptr && segment.mask.data == nullptr) {
    const int keys = static_cast<int>(segment.keys);
    return {0, keys, 0, keys};
  }
  const int2 first = keys_of_row(p, segment, tile.batch, tile.first_row);
  const int2 last = keys_of_row(p, segment, tile.batch, tile.first_row + tile.rows - 1);
  SeenKeys seen{first.x, last.y, last.x, first.y};
  if (p.ranges != nullptr) {
    seen = {0x7FFFFFFF, 0, 0, 0x7FFFFFFF};
    for (int r = static_cast<int>(threadIdx.x % 32); r < tile.rows; r += 32) {
      const int2 keys = keys_of_row(p, segment, tile.batch, tile.first_row + r);
      if (keys.x < keys.y) {
        seen.begin = min(seen.begin, keys.x);
        seen.end = max(seen.end, keys.y);
      }
      seen.full_begin = max(seen.full_begin, keys.x);
      seen.full_end = min(seen.full_end, keys.y);
    }
    seen.begin = __reduce_min_sync(kWarp, seen.begin);
    seen.end = __reduce_max_sync(kWarp, seen.end);
    seen.full_begin = __reduce_max_sync(kWarp, seen.full_begin);
    seen.full_end = __reduce_min_sync(kWarp, seen.full_end);
  }
  if (segment.mask.data != nullptr && tile.first_row + tile.rows > segment.mask.first_row &&
      tile.first_row < segment.mask.first_row + segment.mask.rows) {
    seen.full_end = 0;
  }
  return seen;
}

/// The blocks of kKeys keys that a tile goes through, segment after segment, aligned to the segments' starts: so the
/// blocks that a row adds up do not depend on the rows beside it.
template <int kKeys>
class KeyBlocks {
 public:
  __device__ KeyBlocks(const AttentionProblem& p, const Tile& tile) {
    add(p, tile, 0, first_, count_, full_begin_, full_end_);
    add(p, tile, 1, second_, total_, second_full_begin_, second_full_end_);
    total_ += count_;
    second_ -= count_;
    second_full_begin_ += count_;
    second_full_end_ += count_;
  }
  __device__ int total() const { return total_; }
  __device__ int segment_of(int i) const { return i < count_ ? 0 : 1; }
  __device__ int key_of(int i) const { return ((i < count_ ? first_ : second_) + i) * kKeys; }
  /// Where block i hides nothing: the end of such blocks.
  __device__ int full_end(int i) const { return min(total_, i < count_ ? min(full_end_, count_) : second_full_end_); }
  /// Whether some row of the tile does not see some key of block i.
  __device__ bool hides(int i) const {
    return (i < full_begin_ || i >= full_end_) && (i < second_full_begin_ || i >= second_full_end_);
  }

 private:
  // Blocks of one segment: the first one's place, their count, and those, among them, that all rows see whole.
  __device__ static void add(const AttentionProblem& p, const Tile& tile, int s, int& first, int& count,
                             int& full_begin, int& full_end) {
    first = count = full_begin = full_end = 0;
    if (s >= p.num_key_segments) return;
    const SeenKeys seen = find_seen(p, p.key_segments[s], tile);
    if (seen.begin >= seen.end) return;
    first = seen.begin / kKeys;
    count = (seen.end + kKeys - 1) / kKeys - first;
    full_begin = (seen.full_begin + kKeys - 1) / kKeys - first;
    full_end = seen.full_end / kKeys - first;
  }

  int first_, count_, full_begin_, full_end_;
  int second_, total_, second_full_begin_, second_full_end_;
};

/// The keys of a segment that a thread's two rows see, masks aside.
struct RowLimits {
  int begin[2];
  int end[2];
  __device__ void find(const AttentionProblem& p, const KeySegment& segment, const Tile& tile, int warp_row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + static_cast<int>(threadIdx.x % 32) / 4 + 8 * i;
      const int2 keys = row < tile.rows ? keys_of_row(p, segment, tile.batch, tile.first_row + row) : make_int2(0, 0);
      begin[i] = keys.x;
      end[i] = keys.y;
    }
  }
};

/// Hides the logits of keys from `first_key` on that are outside the limits.
template <int kCount>
__device__ __forceinline__ void hide(const RowLimits& limits, int first_key, float (&logits)[kCount]) {
  const int first = first_key + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int begin = limits.begin[i] - first;
    const int end = limits.end[i] - first;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& logit = logits[4 * j + 2 * i + c];
        logit = 8 * j + c < begin || 8 * j + c >= end ? -INFINITY : logit;
      }
    }
  }
}

/// A mask's element for a row and a key of its segment; 0 where the mask has no such row.
__device__ inline float mask_of(const KeySegment& segment, const Tile& tile, int row, int key) {
  const Mask& mask = segment.mask;
  const std::int64_t mask_row = row - mask.first_row;
  if (mask.data == nullptr || mask_row < 0 || mask_row >= mask.rows) return 0;
  return load_mask(mask, tile.batch * mask.strides.batch + mask_row * mask.strides.token +
                             tile.head * mask.strides.head + key * mask.key_stride);
}

__device__ inline float widen(unsigned char seen) { return seen != 0 ? 0 : -INFINITY; }

/// Adds a mask of elements M to what `hide` left of a thread's two rows: unscaled logits.
template <class M, int kCount>
__device__ __forceinline__ void add_mask(const AttentionProblem& p, const KeySegment& segment, const Tile& tile,
                                         int warp_row, int first_key, float (&logits)[kCount]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float unscale = 1 / p.scale;
  const Mask& mask = segment.mask;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t row = tile.first_row + warp_row + lane / 4 + 8 * i - mask.first_row;
    if (row < 0 || row >= mask.rows || warp_row + lane / 4 + 8 * i >= tile.rows) continue;
    const M* elements = static_cast<const M*>(mask.data) + tile.batch * mask.strides.batch + row * mask.strides.token +
                        tile.head * mask.strides.head;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& logit = logits[4 * j + 2 * i + c];
        if (logit == -INFINITY) continue;  // hidden, maybe past the mask's end
        const float bias = widen(elements[(first_key + 8 * j + 2 * (lane % 4) + c) * mask.key_stride]);
        // A finite bias stays finite, as it hides nothing, also times the scale and log₂ e later. NaN stays NaN.
        const float bounded = (bias < -2e38F ? -2e38F : bias) * unscale;
        logit = bias == -INFINITY ? -INFINITY : logit + (bounded < -3.4e38F ? -3.4e38F : bounded);
      }
    }
  }
}

template <int kCount>
__device__ __forceinline__ void add_mask(const AttentionProblem& p, const KeySegment& segment, const Tile& tile,
                                         int warp_row, int first_key, float (&logits)[kCount]) {
  if (segment.mask.data == nullptr) return;
  switch (segment.mask.type) {
    case ElementType::boolean:
      return add_mask<unsigned char>(p, segment, tile, warp_row, first_key, logits);
    case ElementType::float16:
      return add_mask<__half>(p, segment, tile, warp_row, first_key, logits);
    case ElementType::bfloat16:
      return add_mask<__nv_bfloat16>(p, segment, tile, warp_row, first_key, logits);
    default:
      return add_mask<float>(p, segment, tile, warp_row, first_key, logits);
  }
}

}  // namespace ditattn::kernels::cuda
