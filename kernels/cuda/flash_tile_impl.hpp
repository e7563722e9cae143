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
  unsigned head = order.head_tiles.quotient(index);
  unsigned in_head = index - head * order.head_tiles.divisor;
  if (order.longest_first) {
    const unsigned round = order.all_heads.quotient(index);
    in_head = order.head_tiles.divisor - 1 - round;
    head = index - round * order.all_heads.divisor;
  }
  const bool second = p.num_queries == 2 && in_head >= order.first_tiles;
  const unsigned batch = order.heads.quotient(head);
  const unsigned of_batch = head - batch * order.heads.divisor;
  Tile tile;
  tile.batch = static_cast<int>(batch);
  tile.head = static_cast<int>(of_batch);
  tile.kv_head = static_cast<int>(order.group.quotient(of_batch));
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
  KeyBlocks() = default;
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

}  // namespace ditattn::kernels::cuda
