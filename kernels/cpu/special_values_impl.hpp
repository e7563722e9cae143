/// What V holds that is not finite. Included after tile_rows_impl.hpp.
///
/// In the products it counts as zero: rows that do not see a key multiply it by zero, and 0 · NaN is NaN. Rows that do
/// see it have it added afterwards. Slow and rare.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

// Adds what is not finite in the keys that `special` marks to the rows of the panel at `row` that see it.
void add_special_values(const AttentionProblem& problem, const KeyBlock& block, const TileRows& rows,
                        const float* special, int row, int keys, bool masked, float* out) {
  const KeySegment& segment = problem.key_segments[block.segment];
  const std::int64_t stride = segment.value_strides.token * element_bytes(problem.type);
  const char* values = block_start(problem, block, segment.value, segment.value_strides);
  for (int key = 0; key < keys; ++key) {
    if (special[key] == 0) continue;
    widen_row(values + key * stride, problem.type, problem.head_size, rows.staged);
    for (int v = 0; v < kLanes; v += Simd::kWidth) {
      const Vec seen = lanes_that_see(rows, row, v, key, masked);
      for (std::int64_t d = 0; d < problem.head_size; ++d) {
        const float x = rows.staged[d];
        if (x - x == 0) continue;  // NOLINT(misc-redundant-expression): not so for NaN and Inf
        float* at = out + d * kLanes + v;
        const Vec sum = Simd::load(at);
        Simd::store(at, Simd::select_equal(seen, Simd::set1(0), sum, Simd::add(sum, Simd::set1(x))));
      }
    }
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu
