/// What every kernel by tiles needs of a level: working memory, transposing, and which rows see which keys. Included
/// after a multiply_*_impl.hpp and the `Operands`; all of it is local to the unit.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/half.hpp"
#include "kernels/cpu/tile.hpp"

namespace ditattn::kernels::cpu {
namespace {

constexpr float kLog2E = 1.44269504F;  // logits are kept times this: e^x = 2^(x · log2 e)
constexpr float kLn2 = 0.693147181F;

// Hands out arrays from one piece of memory, 64-byte aligned; only counts where that is null.
struct Arena {
  float* memory;
  std::int64_t used = 0;

  float* take(std::int64_t floats) {
    float* start = memory == nullptr ? nullptr : memory + used;
    used += round_up(floats, 16);
    return start;
  }
};

bool has_mask(const AttentionProblem& problem) {
  return problem.key_segments[0].mask.data != nullptr || problem.key_segments[1].mask.data != nullptr;
}

// Keys [begin, end) of a segment, relative to it, that a row sees, masks aside.
struct Visible {
  std::int64_t begin;
  std::int64_t end;
};

// State of the tile's rows. Panels are outermost in all transposed arrays: element (row, x) of one of `depth` rows is
// at [(row / kLanes · depth + x) · kLanes + row mod kLanes].
struct TileRows {
  float* staged;   // rows of `row_pitch`, on their way to or from the transposed arrays
  float* bias;     // one panel's additive mask, transposed: kTileKeys deep; null without a mask
  float* max;      // running maximum of each row's logits, to the base 2
  float* sum;      // running Σ 2^(logit − max)
  float* rescale;  // 2^(old max − new max)
  float* first;    // keys [first, limit) of the current block are those that each row sees
  float* limit;
  Visible* visible;  // of the current segment
  std::int64_t row_pitch;
};

void carve_rows(Arena& arena, const AttentionProblem& problem, TileRows& rows) {
  rows.row_pitch = round_up(problem.head_size > kTileKeys ? problem.head_size : kTileKeys, 16);
  rows.staged = arena.take(round_up(kStripRows, Simd::kWidth) * rows.row_pitch);
  rows.bias = has_mask(problem) ? arena.take(kLanes * kTileKeys) : nullptr;
  rows.max = arena.take(kTileRows);
  rows.sum = arena.take(kTileRows);
  rows.rescale = arena.take(kTileRows);
  rows.first = arena.take(kTileRows);
  rows.limit = arena.take(kTileRows);
  rows.visible = reinterpret_cast<Visible*>(arena.take(kTileRows * sizeof(Visible) / sizeof(float)));
}

std::int64_t strips_of(std::int64_t rows) { return (rows + kStripRows - 1) / kStripRows; }

// Units of a row of so many elements, `pack` to a unit.
std::int64_t units_of(std::int64_t elements, int pack) { return round_up((elements + pack - 1) / pack, kUnitStep); }

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
int used_lanes(const Tile& tile) { return static_cast<int>(round_up(tile.rows, kLanes)); }

// What belongs to row `row` of the tile.
struct RowPosition {
  std::int64_t head;   // query head
  std::int64_t token;  // query row, over all segments
};

RowPosition position_of(const AttentionProblem& problem, const Tile& tile, int row) {
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

// Keys of a segment that anything in a batch entry sees, masks aside.
std::int64_t segment_length(const KeySegment& segment, std::int64_t batch) {
  if (segment.lengths == nullptr) return segment.keys;
  return clamp(segment.lengths[batch * segment.length_stride] - segment.length_offset, 0, segment.keys);
}

// Of those, keys of a block.
int block_keys(const KeySegment& segment, std::int64_t batch, std::int64_t block) {
  return static_cast<int>(clamp(segment_length(segment, batch) - block * kTileKeys, 0, kTileKeys));
}

// First element of a segment's K or V at a block.
const char* block_start(const AttentionProblem& problem, const KeyBlock& block, const void* base,
                        const Strides& strides) {
  return element_pointer(
      base, problem.type,
      block.batch * strides.batch + block.kv_head * strides.head + block.block * kTileKeys * strides.token);
}

Visible visible_keys(const AttentionProblem& problem, const Tile& tile, const KeySegment& segment, int row) {
  const std::int64_t token = position_of(problem, tile, row).token;
  const std::int64_t length = segment_length(segment, tile.batch);
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

// Transposed rows of Q, `depth` deep; load(source, position, row) fills a row from the elements at `source`.
template <class Load>
void load_query_rows(const AttentionProblem& problem, const Tile& tile, const TileRows& rows, std::int64_t depth,
                     float* query, const Load& load) {
  for (int first = 0; first < used_lanes(tile); first += Simd::kWidth) {
    for (int i = 0; i < Simd::kWidth; ++i) {
      float* row = rows.staged + i * rows.row_pitch;
      if (first + i < tile.rows) {
        const RowPosition position = position_of(problem, tile, first + i);
        if (first + i + kRowsAhead < tile.rows) {
          prefetch_row(query_row(problem, tile.batch, position_of(problem, tile, first + i + kRowsAhead)),
                       problem.head_size * element_bytes(problem.type));
        }
        load(query_row(problem, tile.batch, position), position, row);
      } else {
        std::memset(row, 0, static_cast<std::size_t>(depth) * sizeof(float));
      }
    }
    rows_to_lanes(rows.staged, rows.row_pitch, depth, lane_of(query, depth, first));
  }
}

// Qᵀ in units, times scale · log2 e where the operands want that.
[[maybe_unused]] void load_query(const AttentionProblem& problem, const Tile& tile, const TileRows& rows,
                                 std::int64_t units, float* query) {
  const Vec scale = Simd::set1(problem.scale * kLog2E);
  load_query_rows(problem, tile, rows, units, query, [&](const char* source, RowPosition, float* row) {
    Operands::load_row(source, problem.type, problem.head_size, row);
    for (std::int64_t x = 0; x < units && Operands::kQueryIsScaled; x += Simd::kWidth) {
      Simd::store(row + x, Simd::mul(Simd::load(row + x), scale));
    }
  });
}

// What a row group sees of a block.
enum class Sees : std::uint8_t { nothing, some, all };

// The keys of a segment that each row sees, masks aside. Returns the range that some row sees.
Visible load_visible(const AttentionProblem& problem, const Tile& tile, const TileRows& rows,
                     const KeySegment& segment) {
  Visible seen{.begin = segment.keys, .end = 0};
  const bool alike = !problem.causal && problem.ranges == nullptr;  // then one row tells for all
  for (int row = 0; row < used_lanes(tile); ++row) {
    const bool known = row >= tile.rows || (alike && row > 0);
    const Visible visible = known ? rows.visible[row - 1] : visible_keys(problem, tile, segment, row);
    rows.visible[row] = visible;
    if (visible.begin >= visible.end) continue;
    seen.begin = visible.begin < seen.begin ? visible.begin : seen.begin;
    seen.end = visible.end > seen.end ? visible.end : seen.end;
  }
  return seen;
}

// What one panel's rows see of a block.
struct PanelKeys {
  Sees sees;
  int keys;  // the first so many of the block are all that any of the rows sees, rounded up to whole units
};

// Sets `first` and `limit` of the panel at `row`.
PanelKeys load_limits(const TileRows& rows, int row, std::int64_t first_key, int keys, int unit) {
  bool everything = true;
  std::int64_t last = 0;
  for (int lane = row; lane < row + kLanes; ++lane) {
    const std::int64_t first = clamp(rows.visible[lane].begin - first_key, 0, keys);
    const std::int64_t limit = clamp(rows.visible[lane].end - first_key, 0, keys);
    rows.first[lane] = static_cast<float>(first);
    rows.limit[lane] = static_cast<float>(limit);
    everything = everything && first == 0 && limit == keys;
    if (first < limit) last = limit > last ? limit : last;
  }
  if (everything) return {.sees = Sees::all, .keys = keys};
  if (last == 0) return {.sees = Sees::nothing, .keys = 0};
  return {.sees = Sees::some, .keys = static_cast<int>(clamp(round_up(last, unit), 0, keys))};
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

// Rows of the panel array `out` (head_size deep), each times 1 / sum, to where the problem wants them; and the LSE.
void store_out(const AttentionProblem& problem, const Tile& tile, const TileRows& rows, float* out) {
  for (int row = 0; row < used_lanes(tile); ++row) rows.rescale[row] = rows.sum[row] == 0 ? 0 : 1 / rows.sum[row];
  for (int first = 0; first < tile.rows; first += Simd::kWidth) {
    lanes_to_rows(lane_of(out, problem.head_size, first), rows.rescale + first, problem.head_size, rows.staged,
                  rows.row_pitch);
    for (int row = first; row < tile.rows && row < first + Simd::kWidth; ++row) {
      const RowPosition position = position_of(problem, tile, row);
      const char* target =
          element_pointer(problem.out, problem.out_type, offset_of(problem.out_strides, tile.batch, position));
      store_row(rows.staged + (row - first) * rows.row_pitch, problem.out_type, problem.head_size,
                const_cast<char*>(target));
      if (problem.lse == nullptr) continue;
      problem.lse[offset_of(problem.lse_strides, tile.batch, position)] =
          rows.sum[row] == 0 ? -kInfinity : rows.max[row] * kLn2 + __builtin_logf(rows.sum[row]);
    }
  }
}

// Which lanes of the panel's vector at `row` see a key of the block: 1 or 0.
Vec lanes_that_see(const TileRows& rows, int row, int v, int key, bool masked) {
  const Vec zero = Simd::set1(0);
  const Vec position = Simd::set1(static_cast<float>(key));
  Vec seen = Simd::select_less(position, Simd::load(rows.limit + row + v), Simd::set1(1), zero);
  seen = Simd::select_less(position, Simd::load(rows.first + row + v), zero, seen);
  if (!masked) return seen;
  return Simd::select_equal(Simd::load(rows.bias + key * kLanes + v), Simd::set1(-kInfinity), zero, seen);
}

// --- Blocks ---

// A kernel's blocks of one K/V head: all packed beforehand, or, where `packed` is null, into `buffer` as they come.
struct Blocks {
  const float* packed;
  float* buffer;
  std::int64_t floats;  // of one

  [[nodiscard]] const float* at(const AttentionProblem& problem, const KeyBlock& block) const {
    const std::int64_t before = block.segment == 0 ? 0 : blocks_of(problem.key_segments[0]);
    return packed + (before + block.block) * floats;
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
