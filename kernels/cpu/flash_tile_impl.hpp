/// One tile of attention in terms of a level's `Simd`, `multiply` and `Operands`. Included last by one translation unit
/// per kernel; everything is local to that unit.
///
/// Layout: query rows lie along the vector lanes, keys and head dimensions along registers and loops. The logits of a
/// block are Sᵀ = K · Qᵀ and the output Oᵀ += Vᵀ · Pᵀ, one micro-kernel for both. So the maxima and sums of the softmax
/// need no shuffles, head sizes need no padding, and K and V keep their order; only Q and O are transposed, once a
/// tile. Rejected: queries along registers (the usual GEMM), which must transpose every K block and pads head size 72.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/tile_rows_impl.hpp"
//
#include "kernels/cpu/flash_mask_impl.hpp"
#include "kernels/cpu/special_values_impl.hpp"
#include "kernels/cpu/tile_softmax_impl.hpp"
//
#include "kernels/cpu/flash_products_impl.hpp"
#include "kernels/cpu/flash_softmax_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

// A block of K and V as operands; "units" are the operands', of 4 bytes.
struct BlockLayout {
  std::int64_t units;        // of a row of K: its strips have so many columns
  std::int64_t value_start;  // V's strips have head sizes as rows and units of kPack keys as columns
  std::int64_t value_strip;
  std::int64_t special;      // by key: 1 where V has NaN or Inf
  std::int64_t has_special;  // 1 where some key has
  std::int64_t floats;
};

BlockLayout block_layout(const AttentionProblem& problem) {
  BlockLayout layout{};
  layout.units = units_of(problem.head_size, Operands::kPack);
  layout.value_start = round_up(strips_of(kTileKeys) * strip_floats(layout.units) + strip_floats(Simd::kWidth), 16);
  layout.value_strip = strip_floats(units_of(kTileKeys, Operands::kPack));
  layout.special = round_up(layout.value_start + strips_of(problem.head_size) * layout.value_strip, 16);
  layout.has_special = layout.special + kTileKeys;
  layout.floats = layout.has_special + 16;
  return layout;
}

std::int64_t block_floats(const AttentionProblem& problem) { return block_layout(problem).floats; }

// A tile's working memory.
struct Workspace {
  TileRows rows;
  Blocks blocks;
  BlockLayout layout;
  float* query;        // Qᵀ, `units` deep
  float* out;          // Oᵀ, not yet divided by `sum`: head_size deep
  float* logits;       // one panel of Sᵀ, then Pᵀ in units: kTileKeys deep
  std::int64_t units;  // of a row of head_size
  float* scratch;      // where all this starts
};

std::int64_t carve(const AttentionProblem& problem, const float* packed, float* scratch, Workspace& w) {
  Arena arena{.memory = scratch};
  w.layout = block_layout(problem);
  w.units = w.layout.units;
  w.scratch = scratch;
  carve_rows(arena, problem, w.rows);
  w.query = arena.take(kTileRows * w.units);
  w.out = arena.take(kTileRows * problem.head_size);
  w.logits = arena.take(kLanes * kTileKeys);
  w.blocks = {.packed = packed, .buffer = arena.take(w.layout.floats), .floats = w.layout.floats};
  return arena.used;
}

std::int64_t scratch_floats(const AttentionProblem& problem) {
  Workspace unused{};
  return carve(problem, nullptr, nullptr, unused);
}

void pack_keys(const AttentionProblem& problem, const KeyBlock& block, int keys, const Workspace& w, float* packed) {
  const KeySegment& segment = problem.key_segments[block.segment];
  const std::int64_t bytes = element_bytes(problem.type);
  const std::int64_t stride = segment.key_strides.token * bytes;
  const char* source = block_start(problem, block, segment.key, segment.key_strides);
  for (int key = 0; key < keys; ++key) {
    if (key + kRowsAhead < keys) prefetch_row(source + (key + kRowsAhead) * stride, problem.head_size * bytes);
    const int row = key % kStripRows;
    Operands::load_row(source + key * stride, problem.type, problem.head_size, w.rows.staged + row * w.rows.row_pitch);
    if (row + 1 < kStripRows && key + 1 < keys) continue;
    rows_to_strip(w.rows.staged, w.rows.row_pitch, w.units, packed);
    packed += strip_floats(w.units);
  }
}

// `keys` rows of V at `source`, up to kPack, as one row of units, zero where they are not finite; marks those.
bool load_value_units(const AttentionProblem& problem, const char* source, std::int64_t stride, int keys,
                      float* special, float* units) {
  for (int i = 0; i < keys; ++i) special[i] = 0;
  if (Operands::load_values(source, problem.type, stride, keys, problem.head_size, units)) return false;
  for (std::int64_t x = 0; x < problem.head_size; x += Simd::kWidth) {
    Simd::store(units + x, Operands::finite_or_zero(Simd::load(units + x)));
  }
  for (int i = 0; i < keys; ++i) {
    alignas(64) float part[Simd::kWidth];
    for (std::int64_t x = 0; x < problem.head_size; x += Simd::kWidth) {
      const std::int64_t count = clamp(problem.head_size - x, 0, Simd::kWidth);
      const char* start = element_pointer(source + i * stride, problem.type, x);
      if (Simd::any_nan(widen_row(start, problem.type, count, part))) special[i] = 1;
    }
  }
  return true;
}

void pack_values(const AttentionProblem& problem, const KeyBlock& block, int keys, const Workspace& w, float* packed) {
  const KeySegment& segment = problem.key_segments[block.segment];
  const std::int64_t bytes = element_bytes(problem.type);
  const std::int64_t stride = segment.value_strides.token * bytes;
  const char* source = block_start(problem, block, segment.value, segment.value_strides);
  bool has_special = false;
  const auto units = static_cast<int>(units_of(keys, Operands::kPack));
  for (int unit = 0; unit < units; ++unit) {
    const int key = unit * Operands::kPack;
    float* staged = w.rows.staged + unit % kStripColumns * w.rows.row_pitch;
    if (key < keys) {
      for (int ahead = key + kRowsAhead; ahead < keys && ahead < key + kRowsAhead + Operands::kPack; ++ahead) {
        prefetch_row(source + ahead * stride, problem.head_size * bytes);
      }
      const int pack = keys - key < Operands::kPack ? keys - key : Operands::kPack;
      has_special |=
          load_value_units(problem, source + key * stride, stride, pack, packed + w.layout.special + key, staged);
    } else {
      std::memset(staged, 0, static_cast<std::size_t>(w.rows.row_pitch) * sizeof(float));
    }
    if ((unit + 1) % kStripColumns != 0) continue;
    columns_to_strips(w.rows.staged, w.rows.row_pitch, unit + 1 - kStripColumns, problem.head_size,
                      w.layout.value_strip, packed + w.layout.value_start);
  }
  packed[w.layout.has_special] = has_special ? 1 : 0;
}

void pack_block(const AttentionProblem& problem, const KeyBlock& block, float* packed, float* scratch) {
  Workspace w{};
  carve(problem, nullptr, scratch, w);
  const int keys = block_keys(problem.key_segments[block.segment], block.batch, block.block);
  pack_keys(problem, block, keys, w, packed);
  pack_values(problem, block, keys, w, packed);
}

// What products of Q and K are to be multiplied by for logits to the base 2, where Q does not have it already.
float logit_unit(const AttentionProblem& problem) { return Operands::kQueryIsScaled ? 1 : problem.scale * kLog2E; }

// Asks for one of `parts` of rows that will be needed after the current block. Worth 6 % of 1,4,4096,4096,128 in
// float32 on one thread (Zen 4).
void prefetch_rows(const char* start, std::int64_t stride_bytes, int rows, std::int64_t row_bytes, int part,
                   int parts) {
  for (int row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
    prefetch_row(start + row * stride_bytes, row_bytes);
  }
}

// Asks for part of the block after `block`, which is not packed yet.
void prefetch_block(const AttentionProblem& problem, KeyBlock block, int part, int parts) {
  ++block.block;
  const KeySegment& segment = problem.key_segments[block.segment];
  const int keys = block_keys(segment, block.batch, block.block);
  const std::int64_t bytes = element_bytes(problem.type);
  prefetch_rows(block_start(problem, block, segment.key, segment.key_strides), segment.key_strides.token * bytes, keys,
                problem.head_size * bytes, part, parts);
  prefetch_rows(block_start(problem, block, segment.value, segment.value_strides), segment.value_strides.token * bytes,
                keys, problem.head_size * bytes, part, parts);
}

// One block against all panels of the tile.
void attend_block(const AttentionProblem& problem, const Tile& tile, const Workspace& w, const KeyBlock& block,
                  bool has_next) {
  const std::int64_t depth = problem.head_size;
  const KeySegment& segment = problem.key_segments[block.segment];
  const std::int64_t first_key = block.block * kTileKeys;
  const int block_size = block_keys(segment, tile.batch, block.block);
  const bool is_packed = w.blocks.packed != nullptr;
  if (!is_packed) pack_block(problem, block, w.blocks.buffer, w.scratch);
  const float* key = is_packed ? w.blocks.at(problem, block) : w.blocks.buffer;
  const float* value = key + w.layout.value_start;
  const bool has_special = key[w.layout.has_special] != 0;

  const int panels = used_lanes(tile) / kLanes;
  for (int panel = 0; panel < panels; ++panel) {
    if (has_next && !is_packed) prefetch_block(problem, block, panel, panels);
    const int row = panel * kLanes;
    auto [sees, keys] = load_limits(w.rows, row, first_key, block_size, Operands::kPack);
    bool masked = segment.mask.data != nullptr && sees != Sees::nothing;
    if (masked) {
      const Sees mask_sees = load_bias(problem, tile, w.rows, panel, segment.mask, first_key, keys);
      masked = mask_sees != Sees::all;
      sees = both(sees, mask_sees);
    }
    if (sees == Sees::nothing) continue;
    const LogitProduct logits{.lanes = w.query + row * w.units, .units = w.units};
    multiply(logits, key, strip_floats(w.units), w.logits, keys);
    const bool hides = sees == Sees::some;
    const float unit = logit_unit(problem);
    if (hides) hide(w.logits, unit, masked ? w.rows.bias : nullptr, w.rows.first + row, w.rows.limit + row, keys);
    softmax(w.logits, hides ? 1 : unit, w.rows.max + row, w.rows.sum + row, w.rows.rescale + row, keys);
    float* out = w.out + row * depth;
    const ValueProduct values{
        .lanes = w.logits, .units = units_of(keys, Operands::kPack), .rescale = w.rows.rescale + row};
    multiply(values, value, w.layout.value_strip, out, static_cast<int>(depth));
    if (has_special) add_special_values(problem, block, w.rows, key + w.layout.special, row, keys, masked, out);
  }
}

// The blocks of a segment that some row of the tile sees.
void attend_segment(const AttentionProblem& problem, const Tile& tile, const Workspace& w, int segment) {
  const Visible seen = load_visible(problem, tile, w.rows, problem.key_segments[segment]);
  for (std::int64_t block = seen.begin / kTileKeys; block * kTileKeys < seen.end; ++block) {
    attend_block(problem, tile, w, {.batch = tile.batch, .kv_head = tile.kv_head, .segment = segment, .block = block},
                 (block + 1) * kTileKeys < seen.end);
  }
}

void run_tile(const AttentionProblem& problem, const Tile& tile, const float* packed, float* scratch) {
  Workspace w{};
  carve(problem, packed, scratch, w);
  [[maybe_unused]] const MatrixRegisters registers;
  load_query(problem, tile, w.rows, w.units, w.query);
  const auto lanes = static_cast<std::size_t>(used_lanes(tile));
  std::memset(w.out, 0, lanes * static_cast<std::size_t>(problem.head_size) * sizeof(float));
  for (int row = 0; row < used_lanes(tile); ++row) {
    w.rows.max[row] = -kInfinity;
    w.rows.sum[row] = 0;
  }
  for (int i = 0; i < problem.num_key_segments; ++i) attend_segment(problem, tile, w, i);
  store_out(problem, tile, w.rows, w.out);
}

}  // namespace
}  // namespace ditattn::kernels::cpu
