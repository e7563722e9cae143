/// Blocks of K and V of quantized kernels, row by row, and what of them nobody sees: a mask here is the same for all
/// heads and rows. Included after tile_softmax_impl.hpp.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

constexpr std::int64_t kMostHeadSize = 256;

Vec absolute(Vec x) { return Simd::max(x, Simd::sub(Simd::set1(0), x)); }

// One side of a block, to be read row by row.
struct BlockRows {
  const char* start;
  ElementType type;
  std::int64_t stride;  // bytes
  std::int64_t head_size;
  int keys;

  // A row as float32, followed by zeros up to a whole vector. True if all of it is finite.
  bool load(int key, float* row) const {
    if (key + kRowsAhead < keys) prefetch_row(start + (key + kRowsAhead) * stride, head_size * element_bytes(type));
    const bool finite = !Simd::any_nan(widen_row(start + key * stride, type, head_size, row));
    for (std::int64_t x = head_size; x % Simd::kWidth != 0; ++x) row[x] = 0;
    return finite;
  }
};

BlockRows key_rows(const AttentionProblem& problem, const KeyBlock& block, bool values) {
  const KeySegment& segment = problem.key_segments[block.segment];
  const Strides& strides = values ? segment.value_strides : segment.key_strides;
  return {.start = block_start(problem, block, values ? segment.value : segment.key, strides),
          .type = problem.type,
          .stride = strides.token * element_bytes(problem.type),
          .head_size = problem.head_size,
          .keys = block_keys(segment, block.batch, block.block)};
}

// Marks the keys that no row sees.
int mark_hidden(const AttentionProblem& problem, const KeyBlock& block, int keys, float* hidden) {
  const KeySegment& segment = problem.key_segments[block.segment];
  const Mask& mask = segment.mask;
  int seen = keys;
  for (int key = 0; key < keys; ++key) {
    const std::int64_t index = block.block * kTileKeys + key;
    const std::int64_t position = segment.first_key + index;
    const std::int64_t at = block.batch * mask.strides.batch + index * mask.key_stride;
    const bool outside = problem.seen != nullptr &&
                         (position < problem.seen[2 * block.batch] || position >= problem.seen[2 * block.batch + 1]);
    const bool hides = outside || (mask.data != nullptr && load_mask_element(mask.data, mask.type, at) != 0);
    hidden[key] = hides ? 1 : 0;
    seen -= hides ? 1 : 0;
  }
  return seen;
}

// A row of V, zero where it is hidden, and in single places that are not finite, which `special` marks.
template <class Layout>
void load_value_row(const BlockRows& rows, const Layout& layout, int key, float* packed, float* row) {
  const Vec zero = Simd::set1(0);
  const bool hides = key >= rows.keys || packed[layout.hidden + key] != 0;
  const bool finite = hides || rows.load(key, row);
  for (std::int64_t x = 0; x < rows.head_size && (hides || !finite); x += Simd::kWidth) {
    const Vec v = hides ? zero : Simd::load(row + x);
    Simd::store(row + x, Simd::select_equal(Simd::sub(v, v), zero, v, zero));
  }
  if (key >= rows.keys) return;
  packed[layout.special + key] = finite ? 0 : 1;
  if (!finite) packed[layout.flags + 1] = 1;
}

// Logits of keys that a row does not see become −∞; `hidden`: of the block's keys, null where none is.
void hide_keys(float* logits, const TileRows& rows, const float* hidden, int row, int keys) {
  hide(logits, 1, nullptr, rows.first + row, rows.limit + row, keys);
  for (int key = 0; key < keys && hidden != nullptr; ++key) {
    if (hidden[key] == 0) continue;
    for (int v = 0; v < kLanes; v += Simd::kWidth) Simd::store(logits + key * kLanes + v, Simd::set1(-kInfinity));
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu
