/// One tile of microscaled FP4 attention, emulated (docs/kernels/sage3.md). Layout and loops are those of
/// flash_tile_impl.hpp; each number of NVFP4 times its group's scale is a float32, and a bfloat16, exactly, so the
/// products are those of exact attention. Included last by one translation unit per level and kind of operands.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/tile_rows_impl.hpp"
//
#include "kernels/cpu/special_values_impl.hpp"
#include "kernels/cpu/tile_softmax_impl.hpp"
//
#include "kernels/cpu/block_rows_impl.hpp"
#include "kernels/cpu/rate_impl.hpp"
//
#include "kernels/cpu/nvfp4_impl.hpp"
//
#include "kernels/cpu/sage3_pack_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

struct Sage3Workspace {
  TileRows rows;
  Blocks blocks;
  Sage3Block layout;
  float* query;        // (Q − q̄)ᵀ in float32, head_size deep
  float* query_units;  // its numbers times their groups' scales, `layout.units` deep
  float* query_scale;  // of each row, times scale · log2 e
  float* lse_offset;   // scale · log2 e · q · k̄
  float* out;          // Oᵀ, not yet divided by `sum`
  float* logits;       // one panel: logits to the base 2, then P's numbers times their groups' scales
  float* logit_scale;  // of the panel's rows in the block
  float* weight;       // of the block: what P's numbers are times
};

std::int64_t carve(const AttentionProblem& problem, const float* packed, float* scratch, Sage3Workspace& w) {
  Arena arena{.memory = scratch};
  w.layout = sage3_block(problem);
  carve_rows(arena, problem, w.rows);
  w.query = arena.take(kTileRows * problem.head_size);
  w.query_units = arena.take(kTileRows * w.layout.units);
  w.query_scale = arena.take(kTileRows);
  w.lse_offset = arena.take(kTileRows);
  w.out = arena.take(kTileRows * problem.head_size);
  w.logits = arena.take(kLanes * kTileKeys);
  w.logit_scale = arena.take(kLanes);
  w.weight = arena.take(kLanes);
  w.blocks = {.packed = packed, .buffer = arena.take(w.layout.floats), .floats = w.layout.floats};
  return arena.used;
}

// --- Products ---

// Sᵀ: sums times each row's scale, and what K's own mean products add.
struct LogitProduct {
  using Terms = Operands;
  static constexpr const float* first_sums = nullptr;
  static constexpr bool kKeepsSums = false;
  const float* lanes;  // Q
  std::int64_t units;
  const float* scale;
  const float* correction;  // of the keys

  template <int N>
  void finish(const Vec (&sums)[N], int row, int lane, float* at) const {
    const Vec add = Simd::set1(correction[row]);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      Simd::store(at + v * Simd::kWidth, Simd::fma(sums[v], Simd::load(scale + lane + v * Simd::kWidth), add));
    }
  }
};

// Oᵀ · rescale + sums · weight.
struct ValueProduct {
  using Terms = Operands;
  static constexpr const float* first_sums = nullptr;
  static constexpr bool kKeepsSums = false;
  const float* lanes;  // P
  std::int64_t units;
  const float* rescale;
  const float* weight;

  template <int N>
  void finish(const Vec (&sums)[N], int /*row*/, int lane, float* at) const {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v, lane += Simd::kWidth, at += Simd::kWidth) {
      const Vec before = Simd::mul(Simd::load(at), Simd::load(rescale + lane));
      Simd::store(at, Simd::fma(sums[v], Simd::load(weight + lane), before));
    }
  }
};

double sage3_rate() {
  constexpr float zeros[kLanes > kRateRows ? kLanes : kRateRows] = {};
  const LogitProduct product{.lanes = nullptr, .units = 0, .scale = zeros, .correction = zeros};
  return product_rate(product, Operands::kPack);
}

// --- Q ---

// Quantizes the rows of one vector of a panel.
void quantize_query(const AttentionProblem& problem, const Sage3Workspace& w, const float* query, float* units,
                    int row) {
  const Vec zero = Simd::set1(0);
  Vec largest = zero;
  Vec finite = zero;
  for (std::int64_t d = 0; d < problem.head_size; ++d) {
    const Vec x = Simd::load(query + d * kLanes);
    largest = Simd::max(largest, absolute(x));
    finite = Simd::fma(x, zero, finite);
  }
  const Vec scale = tensor_scale(largest);
  const std::int64_t end = w.layout.units * Operands::kPack;
  for (std::int64_t group = 0; group < end; group += kNvfp4Group) {
    const std::int64_t limit = clamp(problem.head_size - group, 0, kNvfp4Group);
    Vec group_largest = zero;
    for (std::int64_t i = 0; i < limit; ++i) {
      group_largest = Simd::max(group_largest, absolute(Simd::load(query + (group + i) * kLanes)));
    }
    const GroupScale numbers(group_largest, scale);
    for (std::int64_t i = 0; i < kNvfp4Group && group + i < end; i += Operands::kPack) {
      Vec packed[Operands::kPack];
      for (int j = 0; j < Operands::kPack; ++j) {
        packed[j] = i + j < limit ? numbers.apply(Simd::load(query + (group + i + j) * kLanes)) : zero;
      }
      Operands::store_packed(units + (group + i) / Operands::kPack * kLanes, packed);
    }
  }
  // NaN and Inf show as NaN.
  Simd::store(w.query_scale + row, Simd::fma(scale, Simd::set1(problem.scale * kLog2E), finite));
}

void load_sage3_query(const AttentionProblem& problem, const Tile& tile, const Sage3Workspace& w) {
  const float* means = means_of(problem, tile.batch, tile.kv_head);
  const std::int64_t first_head = tile.kv_head * group_of(problem);
  int row_in_tile = 0;
  const auto load = [&](const char* source, RowPosition position, float* row) {
    widen_row(source, problem.type, problem.head_size, row);
    for (std::int64_t i = problem.head_size; i < mean_pitch(problem); ++i) row[i] = 0;
    w.lse_offset[row_in_tile++] = dot(row, means, mean_pitch(problem)) * problem.scale * kLog2E;
    subtract_mean(row, means + (2 + position.head - first_head) * mean_pitch(problem), problem.head_size,
                  problem.head_size);
  };
  load_query_rows(problem, tile, w.rows, problem.head_size, w.query, load);
  for (int first = 0; first < used_lanes(tile); first += Simd::kWidth) {
    quantize_query(problem, w, lane_of(w.query, problem.head_size, first),
                   lane_of(w.query_units, w.layout.units, first), first);
  }
}

// --- Softmax ---

// P of one vector's rows in a group of keys, times 2688, in NVFP4.
void quantize_probabilities(float* p, Vec largest, int keys, float* units) {
  const Vec zero = Simd::set1(0);
  const GroupScale numbers(largest, Simd::set1(1));
  for (int key = 0; key < keys; key += Operands::kPack) {
    Vec packed[Operands::kPack];
    for (int i = 0; i < Operands::kPack; ++i) {
      packed[i] = key + i < keys ? numbers.apply(Simd::load(p + (key + i) * kLanes)) : zero;
    }
    Operands::store_packed(units + key / Operands::kPack * kLanes, packed);
  }
}

// One panel of logits to P's numbers. Updates max and sum, leaves rescale and the block's weight.
void sage3_softmax(const Sage3Workspace& w, int row, int keys, float value_scale) {
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec zero = Simd::set1(0);
  const Vec most = Simd::set1(kSage3ProbabilityMost);
  Vec panel_largest[Simd::kVectors];
  find_largest(w.logits, keys, panel_largest);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    float* logits = w.logits + v;
    const Vec block_max = panel_largest[v / Simd::kWidth];
    const Vec old_max = Simd::load(w.rows.max + row + v);
    const Vec new_max = Simd::max(old_max, block_max);
    // A row that sees no key: subtract 0, so that −∞ gives e^−∞ = 0 and not NaN.
    const Vec add = Simd::sub(zero, Simd::select_equal(block_max, hidden, zero, block_max));
    const Vec subtract = Simd::select_equal(new_max, hidden, zero, new_max);
    Vec total = zero;
    for (int group = 0; group < keys; group += kNvfp4Group) {
      const int count = keys - group < kNvfp4Group ? keys - group : kNvfp4Group;
      float* p = logits + group * kLanes;
      Vec largest = zero;
      for (int key = 0; key < count; ++key) {
        const Vec x = exp2_negative<Exp2Long>(Simd::add(Simd::load(p + key * kLanes), add));
        total = Simd::add(total, x);
        const Vec scaled = Simd::mul(x, most);
        largest = Simd::max(largest, scaled);
        Simd::store(p + key * kLanes, scaled);
      }
      quantize_probabilities(p, largest, count, logits + group / Operands::kPack * kLanes);
    }
    fill_last_step(logits, (keys + Operands::kPack - 1) / Operands::kPack);
    const Vec shrink = exp2_negative<Exp2Long>(Simd::sub(old_max, subtract));
    const Vec weight = exp2_negative<Exp2Long>(Simd::sub(block_max, subtract));
    Simd::store(w.rows.rescale + row + v, shrink);
    Simd::store(w.weight + v, Simd::mul(weight, Simd::set1(value_scale / kSage3ProbabilityMost)));
    Simd::store(w.rows.sum + row + v, Simd::fma(total, weight, Simd::mul(Simd::load(w.rows.sum + row + v), shrink)));
    Simd::store(w.rows.max + row + v, new_max);
  }
}

// --- Blocks ---

// The query head of the group that a row of the tile belongs to; rows past the tile's count as its last.
std::int64_t head_in_group(const AttentionProblem& problem, const Tile& tile, int row) {
  return (tile.first_row + (row < tile.rows ? row : tile.rows - 1)) / problem.rows;
}

// Logits of one panel, whose rows may belong to several query heads.
void find_logits(const AttentionProblem& problem, const Tile& tile, const Sage3Workspace& w, int row,
                 const float* packed, int keys) {
  const Vec scale = Simd::set1(packed[w.layout.scales]);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    Simd::store(w.logit_scale + v, Simd::mul(Simd::load(w.query_scale + row + v), scale));
  }
  constexpr float zeros[kTileKeys] = {};
  const std::int64_t first_head = head_in_group(problem, tile, row);
  const bool one_head = head_in_group(problem, tile, row + kLanes - 1) == first_head;
  const float* corrections = packed + w.layout.correction;
  const LogitProduct product{.lanes = w.query_units + row * w.layout.units,
                             .units = w.layout.units,
                             .scale = w.logit_scale,
                             .correction = one_head ? corrections + first_head * kTileKeys : zeros};
  multiply(product, packed, strip_floats(w.layout.units), w.logits, keys);
  if (one_head) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    const float* correction = corrections + head_in_group(problem, tile, row + lane) * kTileKeys;
    for (int key = 0; key < keys; ++key) w.logits[key * kLanes + lane] += correction[key];
  }
}

// One block against all panels of the tile.
void attend_sage3_block(const AttentionProblem& problem, const Tile& tile, const Sage3Workspace& w,
                        const KeyBlock& block) {
  const std::int64_t depth = problem.head_size;
  const Sage3Block& layout = w.layout;
  const int block_size = block_keys(problem.key_segments[block.segment], tile.batch, block.block);
  if (w.blocks.packed == nullptr) {
    pack_sage3_block(problem, block, w.blocks.buffer, w.rows.staged, w.rows.row_pitch);
  }
  const float* packed = w.blocks.packed == nullptr ? w.blocks.buffer : w.blocks.at(problem, block);
  const auto seen = static_cast<int>(packed[layout.flags]);
  if (seen == 0) return;

  for (int row = 0; row < used_lanes(tile); row += kLanes) {
    const auto [sees, keys] = load_limits(w.rows, row, block.block * kTileKeys, block_size, Operands::kPack);
    if (sees == Sees::nothing) continue;
    find_logits(problem, tile, w, row, packed, keys);
    if (sees == Sees::some || seen < block_size) {
      hide_keys(w.logits, w.rows, seen < block_size ? packed + layout.hidden : nullptr, row, keys);
    }
    sage3_softmax(w, row, keys, packed[layout.scales + 1]);
    float* out = w.out + row * depth;
    const ValueProduct values{.lanes = w.logits,
                              .units = units_of(keys, Operands::kPack),
                              .rescale = w.rows.rescale + row,
                              .weight = w.weight};
    multiply(values, packed + layout.value_start, layout.value_strip, out, static_cast<int>(depth));
    if (packed[layout.flags + 1] != 0) {
      add_special_values(problem, block, w.rows, packed + layout.special, row, keys, false, out);
    }
  }
}

// What smoothing took off.
void add_means(const AttentionProblem& problem, const Tile& tile, const Sage3Workspace& w) {
  const float* mean = means_of(problem, tile.batch, tile.kv_head) + mean_pitch(problem);
  for (int row = 0; row < used_lanes(tile); row += Simd::kWidth) {
    const Vec sum = Simd::load(w.rows.sum + row);
    float* out = lane_of(w.out, problem.head_size, row);
    for (std::int64_t d = 0; d < problem.head_size; ++d) {
      Simd::store(out + d * kLanes, Simd::fma(Simd::set1(mean[d]), sum, Simd::load(out + d * kLanes)));
    }
  }
  for (int row = 0; row < tile.rows; ++row) w.rows.max[row] += w.lse_offset[row];
}

void run_sage3_tile(const AttentionProblem& problem, const Tile& tile, const float* packed, float* scratch) {
  Sage3Workspace w{};
  carve(problem, packed, scratch, w);
  [[maybe_unused]] const MatrixRegisters registers;
  load_sage3_query(problem, tile, w);
  const auto lanes = static_cast<std::size_t>(used_lanes(tile));
  std::memset(w.out, 0, lanes * static_cast<std::size_t>(problem.head_size) * sizeof(float));
  for (int row = 0; row < used_lanes(tile); ++row) {
    w.rows.max[row] = -kInfinity;
    w.rows.sum[row] = 0;
  }
  for (int segment = 0; segment < problem.num_key_segments; ++segment) {
    const Visible seen = load_visible(problem, tile, w.rows, problem.key_segments[segment]);
    for (std::int64_t block = seen.begin / kTileKeys; block * kTileKeys < seen.end; ++block) {
      attend_sage3_block(problem, tile, w,
                         {.batch = tile.batch, .kv_head = tile.kv_head, .segment = segment, .block = block});
    }
  }
  add_means(problem, tile, w);
  store_out(problem, tile, w.rows, w.out);
}

// --- The kernel ---

std::int64_t sage3_scratch_floats(const AttentionProblem& problem) {
  Sage3Workspace unused{};
  return carve(problem, nullptr, nullptr, unused);
}

std::int64_t sage3_block_floats(const AttentionProblem& problem) { return sage3_block(problem).floats; }

void pack_sage3(const AttentionProblem& problem, const KeyBlock& block, float* packed, float* scratch) {
  Sage3Workspace w{};
  carve(problem, nullptr, scratch, w);
  pack_sage3_block(problem, block, packed, w.rows.staged, w.rows.row_pitch);
}

constexpr TileKernel sage3_kernel() {
  static_assert(kSage3Keys == kTileKeys);
  return {&sage3_scratch_floats, &sage3_block_floats, &pack_sage3, &run_sage3_tile, &sage3_rate, &find_sage3_means};
}

}  // namespace
}  // namespace ditattn::kernels::cpu
