/// One tile of quantized attention. Layout and loops are those of flash_tile_impl.hpp; products are of 8-bit numbers. P
/// is scaled per row and key block, so that its largest number is always used in full, and the block's weight against
/// the running maximum stays in float32 (two-level accumulation). Included last by one translation unit per level.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/tile_rows_impl.hpp"
//
#include "kernels/cpu/special_values_impl.hpp"
#include "kernels/cpu/tile_softmax_impl.hpp"
//
#include "kernels/cpu/block_rows_impl.hpp"
#include "kernels/cpu/sage_products_impl.hpp"
//
#include "kernels/cpu/sage_pack_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

struct SageWorkspace {
  TileRows rows;
  Blocks blocks;
  SageBlock layout;
  float* query;          // Qᵀ · scale · log2 e in float32, head_size deep
  float* query_units;    // its numbers, `layout.units` deep
  float* query_scale;    // of each row
  float* start;          // what a row's sums begin with: takes off what K's offset adds
  float* out;            // Oᵀ, not yet divided by `sum`
  float* logits;         // one panel: sums · K's scales, then P's numbers in units
  float* weight;         // of the block: what P's numbers are times
  float* mean_products;  // Q · the block's mean
};

template <class Values>
std::int64_t carve(const AttentionProblem& problem, const float* packed, float* scratch, SageWorkspace& w) {
  Arena arena{.memory = scratch};
  w.layout = sage_block<Values>(problem.head_size);
  carve_rows(arena, problem, w.rows);
  w.query = arena.take(kTileRows * problem.head_size);
  w.query_units = arena.take(kTileRows * w.layout.units);
  w.query_scale = arena.take(kTileRows);
  w.start = arena.take(kTileRows);
  w.out = arena.take(kTileRows * problem.head_size);
  w.logits = arena.take(kLanes * kTileKeys);
  w.weight = arena.take(kLanes);
  w.mean_products = arena.take(kLanes);
  w.blocks = {.packed = packed, .buffer = arena.take(w.layout.floats), .floats = w.layout.floats};
  return arena.used;
}

// Quantizes the rows of vector v of a panel: one scale per row.
void quantize_query(const SageWorkspace& w, std::int64_t head_size, const float* query, float* units, int row) {
  constexpr float most = 127;
  Vec largest = Simd::set1(0);
  Vec finite = Simd::set1(0);
  for (std::int64_t d = 0; d < head_size; ++d) {
    const Vec x = Simd::load(query + d * kLanes);
    largest = Simd::max(largest, absolute(x));
    finite = Simd::fma(x, Simd::set1(0), finite);
  }
  const Vec inverse = inverse_scale(largest, most);
  Vec total = Simd::set1(0);
  for (std::int64_t unit = 0; unit < w.layout.units; ++unit) {
    Vec numbers[Dots::kPack];
    for (int i = 0; i < Dots::kPack; ++i) {
      const std::int64_t d = unit * Dots::kPack + i;
      numbers[i] = d < head_size ? Simd::round(Simd::mul(Simd::load(query + d * kLanes), inverse)) : Simd::set1(0);
      total = Simd::add(total, numbers[i]);
    }
    Simd::store(units + unit * kLanes, Dots::join(numbers));
  }
  Dots::store_sums(w.start + row, Simd::mul(total, Simd::set1(-Dots::kKeyOffset)));
  // Rows of zeros have sums of zero: any scale but zero will do. NaN and Inf show as NaN.
  const Vec none = Simd::set1(0);
  const Vec scale = Simd::select_equal(inverse, none, Simd::set1(1), Simd::mul(largest, Simd::set1(1 / most)));
  Simd::store(w.query_scale + row, Simd::add(scale, finite));
}

void load_sage_query(const AttentionProblem& problem, const Tile& tile, const SageWorkspace& w) {
  load_query(problem, tile, w.rows, problem.head_size, w.query);
  for (int first = 0; first < used_lanes(tile); first += Simd::kWidth) {
    quantize_query(w, problem.head_size, lane_of(w.query, problem.head_size, first),
                   lane_of(w.query_units, w.layout.units, first), first);
  }
}

// Q · the block's mean for a panel.
void multiply_mean(const float* query, const float* mean, std::int64_t head_size, float* products) {
  Vec sums[Simd::kVectors];
  for (Vec& sum : sums) sum = Simd::set1(0);
  for (std::int64_t d = 0; d < head_size; ++d) {
    for (int v = 0; v < Simd::kVectors; ++v) {
      sums[v] = Simd::fma(Simd::set1(mean[d]), Simd::load(query + d * kLanes + v * Simd::kWidth), sums[v]);
    }
  }
  for (int v = 0; v < Simd::kVectors; ++v) Simd::store(products + v * Simd::kWidth, sums[v]);
}

// One panel of sums to P's numbers: a row's logit is sum · its scale + Q · mean. Updates max and sum, leaves rescale
// and the block's weight.
template <class Values>
void sage_softmax(const SageWorkspace& w, int row, int keys) {
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec zero = Simd::set1(0);
  Vec panel_largest[Simd::kVectors];
  find_largest(w.logits, keys, panel_largest);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    float* logits = w.logits + v;
    const Vec largest = panel_largest[v / Simd::kWidth];
    const Vec old_max = Simd::load(w.rows.max + row + v);
    // A row that sees no key of the block: nothing of its Q shows, not even NaN, and −∞ gives 0.
    const Vec unit = Simd::select_equal(largest, hidden, Simd::set1(1), Simd::load(w.query_scale + row + v));
    const Vec block_max =
        Simd::select_equal(largest, hidden, hidden, Simd::fma(largest, unit, Simd::load(w.mean_products + v)));
    const Vec new_max = Simd::max(old_max, block_max);
    const Vec nearest = Simd::select_equal(largest, hidden, zero, Simd::mul(largest, unit));
    const Vec subtract = Simd::select_equal(new_max, hidden, zero, new_max);
    const Vec add = Simd::sub(Simd::set1(Values::kQuantized ? kLog2ProbabilityMost : 0), nearest);
    Vec total = zero;
    for (int key = keys; key % Values::kPack != 0; ++key) Simd::store(logits + key * kLanes, hidden);
    for (int key = 0; key < keys; key += Values::kPack) {
      Vec p[Values::kPack];
#pragma GCC unroll 4
      for (int i = 0; i < Values::kPack; ++i) {
        p[i] = exp2_negative<Exp2Short>(Simd::fma(Simd::load(logits + (key + i) * kLanes), unit, add));
        total = Simd::add(total, p[i]);
      }
      Simd::store(logits + key / Values::kPack * kLanes, Values::join(p));
    }
    fill_last_step(logits, (keys + Values::kPack - 1) / Values::kPack);
    const Vec shrink = exp2_negative<Exp2Short>(Simd::sub(old_max, subtract));
    const Vec weight =
        Simd::mul(exp2_negative<Exp2Short>(Simd::sub(block_max, subtract)), Simd::set1(1 / Values::kMost));
    Simd::store(w.rows.rescale + row + v, shrink);
    Simd::store(w.weight + v, weight);
    Simd::store(w.rows.sum + row + v, Simd::fma(total, weight, Simd::mul(Simd::load(w.rows.sum + row + v), shrink)));
    Simd::store(w.rows.max + row + v, new_max);
  }
}

// One block against all panels of the tile.
template <class Values>
void attend_sage_block(const AttentionProblem& problem, const Tile& tile, const SageWorkspace& w,
                       const KeyBlock& block) {
  const std::int64_t depth = problem.head_size;
  const SageBlock& layout = w.layout;
  const int block_size = block_keys(problem.key_segments[block.segment], tile.batch, block.block);
  if (w.blocks.packed == nullptr) {
    pack_sage_block<Values>(problem, block, w.blocks.buffer, w.rows.staged, w.rows.row_pitch);
  }
  const float* packed = w.blocks.packed == nullptr ? w.blocks.buffer : w.blocks.at(problem, block);
  const auto seen = static_cast<int>(packed[layout.flags]);
  if (seen == 0) return;

  for (int row = 0; row < used_lanes(tile); row += kLanes) {
    const auto [sees, keys] = load_limits(w.rows, row, block.block * kTileKeys, block_size, Dots::kPack);
    if (sees == Sees::nothing) continue;
    const LogitProduct logits{.lanes = w.query_units + row * layout.units,
                              .units = layout.units,
                              .first_sums = w.start + row,
                              .scales = packed + layout.key_scale};
    multiply(logits, packed, strip_floats(layout.units), w.logits, keys);
    multiply_mean(w.query + row * depth, packed + layout.mean, depth, w.mean_products);
    if (sees == Sees::some || seen < block_size) {
      hide_keys(w.logits, w.rows, seen < block_size ? packed + layout.hidden : nullptr, row, keys);
    }
    sage_softmax<Values>(w, row, keys);
    float* out = w.out + row * depth;
    const ValueProduct<Values> values{.lanes = w.logits,
                                      .units = units_of(keys, Values::kPack),
                                      .rescale = w.rows.rescale + row,
                                      .weight = w.weight,
                                      .scales = packed + layout.value_scale};
    multiply(values, packed + layout.value_start, layout.value_strip, out, static_cast<int>(depth));
    if (packed[layout.flags + 1] != 0) {
      add_special_values(problem, block, w.rows, packed + layout.special, row, keys, false, out);
    }
  }
}

template <class Values>
void run_sage_tile(const AttentionProblem& problem, const Tile& tile, const float* packed, float* scratch) {
  SageWorkspace w{};
  carve<Values>(problem, packed, scratch, w);
  [[maybe_unused]] const MatrixRegisters registers;
  load_sage_query(problem, tile, w);
  const auto lanes = static_cast<std::size_t>(used_lanes(tile));
  std::memset(w.out, 0, lanes * static_cast<std::size_t>(problem.head_size) * sizeof(float));
  for (int row = 0; row < used_lanes(tile); ++row) {
    w.rows.max[row] = -kInfinity;
    w.rows.sum[row] = 0;
  }
  for (int segment = 0; segment < problem.num_key_segments; ++segment) {
    const Visible seen = load_visible(problem, tile, w.rows, problem.key_segments[segment]);
    for (std::int64_t block = seen.begin / kTileKeys; block * kTileKeys < seen.end; ++block) {
      attend_sage_block<Values>(problem, tile, w,
                                {.batch = tile.batch, .kv_head = tile.kv_head, .segment = segment, .block = block});
    }
  }
  store_out(problem, tile, w.rows, w.out);
}

// --- The kernel ---

template <class Values>
std::int64_t sage_scratch_floats(const AttentionProblem& problem) {
  SageWorkspace unused{};
  return carve<Values>(problem, nullptr, nullptr, unused);
}

template <class Values>
std::int64_t sage_block_floats(const AttentionProblem& problem) {
  return sage_block<Values>(problem.head_size).floats;
}

template <class Values>
void pack_sage(const AttentionProblem& problem, const KeyBlock& block, float* packed, float* scratch) {
  SageWorkspace w{};
  carve<Values>(problem, nullptr, scratch, w);
  pack_sage_block<Values>(problem, block, packed, w.rows.staged, w.rows.row_pitch);
}

template <class Values>
constexpr TileKernel sage_kernel() {
  return {&sage_scratch_floats<Values>, &sage_block_floats<Values>, &pack_sage<Values>, &run_sage_tile<Values>,
          &value_rate<Values>};
}

}  // namespace
}  // namespace ditattn::kernels::cpu
