/// Masks of any shape, panel by panel. Included after tile_rows_impl.hpp.

#include <cstdint>
#include <cstring>

namespace ditattn::kernels::cpu {
namespace {

// Keys of a mask's row as what is added to logits.
void load_mask_row(const Mask& mask, std::int64_t first, int keys, float* destination) {
  if (mask.type != ElementType::boolean && mask.key_stride == 1) {
    widen_row(element_pointer(mask.data, mask.type, first), mask.type, keys, destination);
    return;
  }
  for (int key = 0; key < keys; ++key) {
    destination[key] = load_mask_element(mask.data, mask.type, first + key * mask.key_stride);
  }
}

Sees both(Sees a, Sees b) { return a < b ? a : b; }

// A panel's mask of a block. `some` also where it adds something.
Sees load_bias(const AttentionProblem& problem, const Tile& tile, const TileRows& rows, int panel, const Mask& mask,
               std::int64_t first_key, int keys) {
  const int first_row = panel * kLanes;
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec zero = Simd::set1(0);
  Vec seen = hidden;     // 0 if something is not hidden
  Vec different = zero;  // not 0 if something is added or hidden
  for (int first = first_row; first < first_row + kLanes; first += Simd::kWidth) {
    for (int i = 0; i < Simd::kWidth; ++i) {
      float* row = rows.staged + i * rows.row_pitch;
      RowPosition position = position_of(problem, tile, first + i < tile.rows ? first + i : tile.rows - 1);
      position.token -= mask.first_row;
      if (position.token >= 0 && position.token < mask.rows) {
        const std::int64_t start = offset_of(mask.strides, tile.batch, position) + first_key * mask.key_stride;
        load_mask_row(mask, start, keys, row);
      } else {
        std::memset(row, 0, sizeof(float) * kTileKeys);
      }
    }
    float* lanes = rows.bias + (first - first_row);
    rows_to_lanes(rows.staged, rows.row_pitch, keys, lanes);
    for (int key = 0; key < keys; ++key) {
      const Vec b = Simd::load(lanes + key * kLanes);
      seen = Simd::select_equal(b, hidden, seen, zero);
      different = Simd::select_equal(b, zero, different, Simd::set1(1));
    }
  }
  if (!Simd::any_not_equal(different, zero)) return Sees::all;
  return Simd::any_not_equal(seen, hidden) ? Sees::some : Sees::nothing;
}

}  // namespace
}  // namespace ditattn::kernels::cpu
