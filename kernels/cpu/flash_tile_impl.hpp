/// One tile of attention in terms of a level's `Simd` and `Operands`. Included last by one translation unit per kernel;
/// everything is local to that unit.
///
/// Layout: query rows lie along the vector lanes, keys and head dimensions along registers and loops. The logits of a
/// block are Sᵀ = K · Qᵀ and the output Oᵀ += Vᵀ · Pᵀ, one micro-kernel for both. So the maxima and sums of the softmax
/// need no shuffles, head sizes need no padding, and K and V are read as they lie; only Q and O are transposed, once a
/// tile. Rejected: queries along registers (the usual GEMM), which must transpose every K block and pads head size 72.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/flash_tile.hpp"
#include "kernels/cpu/half.hpp"

namespace ditattn::kernels::cpu {
namespace {

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

std::int64_t row_units(std::int64_t head_size) { return (head_size + Operands::kPack - 1) / Operands::kPack; }

// A tile's working memory. Panels are outermost: element (row, x) of a transposed array of `depth` rows is at
// [(row / kLanes · depth + x) · kLanes + row mod kLanes]. "Units" are the operands', of 4 bytes.
struct Workspace {
  float* query;    // Qᵀ, `units` deep
  float* out;      // Oᵀ, not yet divided by `sum`: head_size deep
  float* logits;   // one panel of Sᵀ, then Pᵀ in units: kTileKeys deep
  float* bias;     // one panel's additive mask, transposed like the logits; null without a mask
  float* key;      // block of K: a row has `units`, `pitch` apart
  float* value;    // block of V: a row of head_size units is `pitch` from the next, and has kPack keys
  float* rows;     // kWidth rows of `row_pitch`, on their way to or from the transposed arrays
  float* max;      // running maximum of each row's logits
  float* sum;      // running Σ exp(logit − max)
  float* rescale;  // exp(old max − new max)
  float* first;    // keys [first, limit) of the current block are those that each row sees
  float* limit;
  std::int64_t pitch;
  std::int64_t row_pitch;
  std::int64_t units;  // of a row of head_size
};

// Lays the arrays out from `scratch` on and returns what they take; only counts where it is null.
std::int64_t carve(float* scratch, std::int64_t head_size, bool has_mask, Workspace& w) {
  w.pitch = round_up(head_size, 16);
  if (w.pitch % 32 == 0) w.pitch += 16;  // an odd number of cache lines: the rows of a column fall into all sets
  w.row_pitch = round_up(head_size > kTileKeys ? head_size : kTileKeys, 16);
  w.units = row_units(head_size);
  std::int64_t used = 0;
  const auto take = [&](std::int64_t floats) {
    float* start = scratch == nullptr ? nullptr : scratch + used;
    used += round_up(floats, 16);
    return start;
  };
  w.query = take(kTileRows * w.units);
  w.out = take(kTileRows * head_size);
  w.logits = take(kLanes * kTileKeys);
  w.bias = has_mask ? take(kLanes * kTileKeys) : nullptr;
  w.key = take(kTileKeys * w.pitch);
  w.value = take(kTileKeys * w.pitch);
  w.rows = take(Simd::kWidth * w.row_pitch);
  w.max = take(kTileRows);
  w.sum = take(kTileRows);
  w.rescale = take(kTileRows);
  w.first = take(kTileRows);
  w.limit = take(kTileRows);
  return used;
}

std::int64_t scratch_floats(std::int64_t head_size, bool has_mask) {
  Workspace unused{};
  return carve(nullptr, head_size, has_mask, unused);
}

// --- Transposing ---

// kWidth rows of `count` units, `pitch` apart, to columns of a panel: unit x of row i goes to panel[x · kLanes + i].
void rows_to_lanes(const float* rows, std::int64_t pitch, std::int64_t count, float* panel) {
  for (std::int64_t x = 0; x < count; x += Simd::kWidth) {
    Vec block[Simd::kWidth];
    for (int i = 0; i < Simd::kWidth; ++i) block[i] = Simd::load(rows + i * pitch + x);
    Simd::transpose(block);
    for (int i = 0; i < Simd::kWidth && x + i < count; ++i) Simd::store(panel + (x + i) * kLanes, block[i]);
  }
}

// The way back, row i times factors[i].
void lanes_to_rows(const float* panel, const float* factors, std::int64_t count, float* rows, std::int64_t pitch) {
  const Vec factor = Simd::load(factors);
  for (std::int64_t x = 0; x < count; x += Simd::kWidth) {
    Vec block[Simd::kWidth];
    for (int i = 0; i < Simd::kWidth; ++i) {
      block[i] = x + i < count ? Simd::mul(Simd::load(panel + (x + i) * kLanes), factor) : factor;
    }
    Simd::transpose(block);
    for (int i = 0; i < Simd::kWidth; ++i) Simd::store(rows + i * pitch + x, block[i]);
  }
}

// --- Rows of the problem ---

// Lanes in use: the tile's rows, rounded up to whole panels. Lanes past the rows compute on zeros and are never stored.
int used_lanes(const FlashTile& tile) { return static_cast<int>(round_up(tile.rows, kLanes)); }

// What belongs to row `row` of the tile.
struct RowPosition {
  std::int64_t head;   // query head
  std::int64_t token;  // query row, over all segments
};

RowPosition position_of(const AttentionProblem& problem, const FlashTile& tile, int row) {
  const std::int64_t index = tile.first_row + row;
  return {.head = tile.kv_head * (problem.heads / problem.kv_heads) + index / problem.rows,
          .token = index % problem.rows};
}

std::int64_t offset_of(const Strides& strides, std::int64_t batch, RowPosition row) {
  return batch * strides.batch + row.token * strides.token + row.head * strides.head;
}

const char* query_row(const AttentionProblem& problem, std::int64_t batch, RowPosition row) {
  const bool second = problem.num_queries == 2 && row.token >= problem.queries[1].first_row;
  const QuerySegment& segment = problem.queries[second ? 1 : 0];
  row.token -= segment.first_row;
  return element_pointer(segment.data, problem.type, offset_of(segment.strides, batch, row));
}

std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) { return x < low ? low : x > high ? high : x; }

// Keys [begin, end) of a segment, relative to it, that a row sees, masks aside.
struct Visible {
  std::int64_t begin;
  std::int64_t end;
};

Visible visible_keys(const AttentionProblem& problem, const FlashTile& tile, const KeySegment& segment, int row) {
  const std::int64_t token = position_of(problem, tile, row).token;
  std::int64_t length = segment.keys;
  if (segment.lengths != nullptr) {
    length = clamp(segment.lengths[tile.batch * segment.length_stride] - segment.length_offset, 0, segment.keys);
  }
  Visible visible{.begin = 0, .end = length};
  if (problem.causal) visible.end = clamp(token + problem.causal_offset + 1 - segment.first_key, 0, length);
  if (problem.ranges != nullptr) {
    const std::int64_t* range = problem.ranges + tile.batch * problem.range_batch_stride + 2 * token;
    visible.begin = clamp(range[0] - segment.first_key, 0, length);
    visible.end = clamp(range[1] - segment.first_key, 0, length);
  }
  return visible;
}

// Lane `row` of a transposed array.
float* lane_of(float* transposed, std::int64_t depth, int row) {
  return transposed + static_cast<std::int64_t>(row / kLanes) * depth * kLanes + row % kLanes;
}

void load_query(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w) {
  const Vec scale = Simd::set1(problem.scale);
  for (int first = 0; first < used_lanes(tile); first += Simd::kWidth) {
    for (int i = 0; i < Simd::kWidth; ++i) {
      float* row = w.rows + i * w.row_pitch;
      if (first + i < tile.rows) {
        const char* source = query_row(problem, tile.batch, position_of(problem, tile, first + i));
        Operands::load_row(source, problem.type, problem.head_size, row);
      } else {
        std::memset(row, 0, static_cast<std::size_t>(w.units) * sizeof(float));
      }
    }
    float* panel = lane_of(w.query, w.units, first);
    rows_to_lanes(w.rows, w.row_pitch, w.units, panel);
    if (!Operands::kQueryIsScaled) continue;
    for (std::int64_t x = 0; x < w.units; ++x) {
      Simd::store(panel + x * kLanes, Simd::mul(Simd::load(panel + x * kLanes), scale));
    }
  }
}

// What products of Q and K are to be multiplied by: the scale, where Q does not have it already.
float logit_unit(const AttentionProblem& problem) { return Operands::kQueryIsScaled ? 1 : problem.scale; }

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

// What a row group sees of a block.
enum class Sees : std::uint8_t { nothing, some, all };

Sees both(Sees a, Sees b) { return a < b ? a : b; }

// A panel's mask of a block. `some` also where it adds something.
Sees load_bias(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w, int panel, const Mask& mask,
               std::int64_t first_key, int keys) {
  const int first_row = panel * kLanes;
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec zero = Simd::set1(0);
  Vec seen = hidden;     // 0 if something is not hidden
  Vec different = zero;  // not 0 if something is added or hidden
  for (int first = first_row; first < first_row + kLanes; first += Simd::kWidth) {
    for (int i = 0; i < Simd::kWidth; ++i) {
      float* row = w.rows + i * w.row_pitch;
      RowPosition position = position_of(problem, tile, first + i < tile.rows ? first + i : tile.rows - 1);
      position.token -= mask.first_row;
      if (position.token >= 0 && position.token < mask.rows) {
        const std::int64_t start = offset_of(mask.strides, tile.batch, position) + first_key * mask.key_stride;
        load_mask_row(mask, start, keys, row);
      } else {
        std::memset(row, 0, sizeof(float) * kTileKeys);
      }
    }
    float* lanes = w.bias + (first - first_row);
    rows_to_lanes(w.rows, w.row_pitch, keys, lanes);
    for (int key = 0; key < keys; ++key) {
      const Vec b = Simd::load(lanes + key * kLanes);
      seen = Simd::select_equal(b, hidden, seen, zero);
      different = Simd::select_equal(b, zero, different, Simd::set1(1));
    }
  }
  if (!Simd::any_not_equal(different, zero)) return Sees::all;
  return Simd::any_not_equal(seen, hidden) ? Sees::some : Sees::nothing;
}

// Each row's visible keys of the block that starts at `first_key`.
void load_limits(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w, const KeySegment& segment,
                 std::int64_t first_key, int keys) {
  for (int row = 0; row < used_lanes(tile); ++row) {
    const Visible visible = visible_keys(problem, tile, segment, row < tile.rows ? row : tile.rows - 1);
    w.first[row] = static_cast<float>(clamp(visible.begin - first_key, 0, keys));
    w.limit[row] = static_cast<float>(clamp(visible.end - first_key, 0, keys));
  }
}

Sees panel_sees(const Workspace& w, int panel, int keys) {
  bool something = false;
  bool everything = true;
  for (int lane = panel * kLanes; lane < (panel + 1) * kLanes; ++lane) {
    something = something || w.first[lane] < w.limit[lane];
    everything = everything && w.first[lane] == 0 && w.limit[lane] == static_cast<float>(keys);
  }
  return everything ? Sees::all : something ? Sees::some : Sees::nothing;
}

// --- Results ---

// A row of results, already divided, in the problem's type.
void store_row(const float* row, ElementType type, std::int64_t count, char* target) {
  if (type == ElementType::float32) {
    std::memcpy(target, row, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  auto* halves = reinterpret_cast<std::uint16_t*>(target);
  if (type == ElementType::float16) {
    for (std::int64_t d = 0; d < count; ++d) halves[d] = to_f16(row[d]);
  } else {
    for (std::int64_t d = 0; d < count; ++d) halves[d] = to_bf16(row[d]);
  }
}

void store_out(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w) {
  for (int row = 0; row < used_lanes(tile); ++row) w.rescale[row] = w.sum[row] == 0 ? 0 : 1 / w.sum[row];
  for (int first = 0; first < tile.rows; first += Simd::kWidth) {
    lanes_to_rows(lane_of(w.out, problem.head_size, first), w.rescale + first, problem.head_size, w.rows, w.row_pitch);
    for (int row = first; row < tile.rows && row < first + Simd::kWidth; ++row) {
      const RowPosition position = position_of(problem, tile, row);
      const char* target =
          element_pointer(problem.out, problem.type, offset_of(problem.out_strides, tile.batch, position));
      store_row(w.rows + (row - first) * w.row_pitch, problem.type, problem.head_size, const_cast<char*>(target));
      if (problem.lse == nullptr) continue;
      problem.lse[offset_of(problem.lse_strides, tile.batch, position)] =
          w.sum[row] == 0 ? -kInfinity : w.max[row] + __builtin_logf(w.sum[row]);
    }
  }
}

// --- The tile ---

// First element of a segment's K or V at a key, for the tile's batch entry and head.
const char* key_row(const AttentionProblem& problem, const FlashTile& tile, const void* base, const Strides& strides,
                    std::int64_t key) {
  return element_pointer(base, problem.type,
                         tile.batch * strides.batch + tile.kv_head * strides.head + key * strides.token);
}

// Which lanes of vector v see a key of the block: 1 or 0.
Vec lanes_that_see(const Workspace& w, std::int64_t row, int v, int key, bool masked) {
  const Vec zero = Simd::set1(0);
  const Vec position = Simd::set1(static_cast<float>(key));
  Vec seen = Simd::select_less(position, Simd::load(w.limit + row + v), Simd::set1(1), zero);
  seen = Simd::select_less(position, Simd::load(w.first + row + v), zero, seen);
  if (!masked) return seen;
  return Simd::select_equal(Simd::load(w.bias + key * kLanes + v), Simd::set1(-kInfinity), zero, seen);
}

// Oᵀ += Vᵀ · Pᵀ for the panel at `row` where V has NaN or Inf and some positions are hidden: 0 · NaN must not happen
// there, so V is zero in the lanes that do not see it. Otherwise the operations of `multiply` in its order, so that
// results do not depend on which of the two ran. Slow and rare.
void multiply_visible(const Workspace& w, std::int64_t row, float* out, int keys, std::int64_t depth, bool masked) {
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    const Vec rescale = Simd::load(w.rescale + row + v);
    for (std::int64_t d = 0; d < depth; ++d) {
      Simd::store(out + d * kLanes + v, Simd::mul(Simd::load(out + d * kLanes + v), rescale));
    }
    for (int unit = 0; unit < row_units(keys); ++unit) {
      Vec seen[Operands::kPack];
      for (int i = 0; i < Operands::kPack; ++i) {
        const int key = unit * Operands::kPack + i;
        seen[i] = key < keys ? lanes_that_see(w, row, v, key, masked) : Simd::set1(0);
      }
      const Vec p = Simd::load(w.logits + unit * kLanes + v);
      for (std::int64_t d = 0; d < depth; ++d) {
        float* sum = out + d * kLanes + v;
        const Vec value = Operands::zero_unless(seen, Simd::set1(w.value[unit * w.pitch + d]));
        Simd::store(sum, Operands::multiply_add(value, p, Simd::load(sum)));
      }
    }
  }
}

// Asks for rows [begin, end) of a block that will be needed next: rows lie far apart, which no hardware prefetcher
// follows. Worth 6 % of 1,4,4096,4096,128 in float32 on one thread (Zen 4), 4 % in bfloat16.
void prefetch_rows(const char* block, std::int64_t stride_bytes, int begin, int end, std::int64_t row_bytes) {
  for (int row = begin; row < end; ++row) {
    const char* start = block + row * stride_bytes;
    for (std::int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(start + at, 0, 2);
  }
}

// One block of a segment's keys, of which `next_keys` follow, against all panels of the tile.
void attend_block(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w, const KeySegment& segment,
                  std::int64_t first_key, int keys, int next_keys) {
  const std::int64_t depth = problem.head_size;
  const std::int64_t bytes = element_bytes(problem.type);
  const std::int64_t key_stride = segment.key_strides.token;
  const std::int64_t value_stride = segment.value_strides.token;
  const char* key = key_row(problem, tile, segment.key, segment.key_strides, first_key);
  const char* value = key_row(problem, tile, segment.value, segment.value_strides, first_key);
  load_limits(problem, tile, w, segment, first_key, keys);
  Operands::load_keys(key, problem.type, key_stride, keys, depth, w.key, w.pitch);
  const bool value_is_finite = Operands::load_values(value, problem.type, value_stride, keys, depth, w.value, w.pitch);

  const int panels = used_lanes(tile) / kLanes;
  for (int panel = 0; panel < panels; ++panel) {
    if (next_keys > 0) {
      const int begin = next_keys * panel / panels;
      const int end = next_keys * (panel + 1) / panels;
      prefetch_rows(key + keys * key_stride * bytes, key_stride * bytes, begin, end, depth * bytes);
      prefetch_rows(value + keys * value_stride * bytes, value_stride * bytes, begin, end, depth * bytes);
    }

    Sees sees = panel_sees(w, panel, keys);
    bool masked = segment.mask.data != nullptr && sees != Sees::nothing;
    if (masked) {
      const Sees mask_sees = load_bias(problem, tile, w, panel, segment.mask, first_key, keys);
      masked = mask_sees != Sees::all;
      sees = both(sees, mask_sees);
    }
    if (sees == Sees::nothing) continue;
    const std::int64_t row = static_cast<std::int64_t>(panel) * kLanes;
    multiply(w.key, w.pitch, 1, w.query + row * w.units, nullptr, w.logits, keys, w.units);
    const bool hides = sees == Sees::some;
    const float unit = logit_unit(problem);
    if (hides) hide(w.logits, unit, masked ? w.bias : nullptr, w.first + row, w.limit + row, keys);
    softmax(w.logits, hides ? 1 : unit, w.max + row, w.sum + row, w.rescale + row, keys);
    float* out = w.out + row * depth;
    if (hides && !value_is_finite) {
      multiply_visible(w, row, out, keys, depth, masked);
    } else {
      multiply(w.value, 1, w.pitch, w.logits, w.rescale + row, out, depth, row_units(keys));
    }
  }
}

// The blocks of a segment that some row of the tile sees. They start at multiples of kTileKeys whatever the rows, so
// that a row's result does not depend on its neighbours.
void attend_segment(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w,
                    const KeySegment& segment) {
  std::int64_t begin = segment.keys;
  std::int64_t end = 0;
  for (int row = 0; row < tile.rows; ++row) {
    const Visible visible = visible_keys(problem, tile, segment, row);
    if (visible.begin >= visible.end) continue;
    begin = visible.begin < begin ? visible.begin : begin;
    end = visible.end > end ? visible.end : end;
  }
  for (std::int64_t key = begin / kTileKeys * kTileKeys; key < end; key += kTileKeys) {
    const auto keys = static_cast<int>(clamp(end - key, 0, kTileKeys));
    const auto next_keys = static_cast<int>(clamp(end - key - keys, 0, kTileKeys));
    attend_block(problem, tile, w, segment, key, keys, next_keys);
  }
}

bool has_mask(const AttentionProblem& problem) {
  return problem.key_segments[0].mask.data != nullptr || problem.key_segments[1].mask.data != nullptr;
}

void run_tile(const AttentionProblem& problem, const FlashTile& tile, float* scratch) {
  Workspace w{};
  carve(scratch, problem.head_size, has_mask(problem), w);
  load_query(problem, tile, w);
  const auto lanes = static_cast<std::size_t>(used_lanes(tile));
  std::memset(w.out, 0, lanes * static_cast<std::size_t>(problem.head_size) * sizeof(float));
  for (int row = 0; row < used_lanes(tile); ++row) {
    w.max[row] = -kInfinity;
    w.sum[row] = 0;
  }
  for (int i = 0; i < problem.num_key_segments; ++i) attend_segment(problem, tile, w, problem.key_segments[i]);
  store_out(problem, tile, w);
}

}  // namespace
}  // namespace ditattn::kernels::cpu
