/// One tile of attention in terms of a level's `Simd`. Included by one translation unit per level, after its
/// simd_*.hpp; everything is local to that unit.
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

using Vec = Simd::Vec;
constexpr int kLanes = Simd::kWidth * Simd::kVectors;  // query rows of one panel
constexpr int kPanels = kTileRows / kLanes;
constexpr float kInfinity = __builtin_inff();

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// A tile's working memory. Panels are outermost: element (row, x) of a transposed array of `depth` rows is at
// [(row / kLanes · depth + x) · kLanes + row mod kLanes].
struct Workspace {
  float* query;       // Qᵀ, scaled: head_size deep
  float* out;         // Oᵀ, not yet divided by `sum`: head_size deep
  float* logits;      // Sᵀ, then Pᵀ: kTileKeys deep
  float* mask_row;    // one row of kTileKeys of the mask
  float* bias;        // additive mask, transposed like the logits; null without a mask
  float* key;         // block of K, `pitch` floats a row
  float* value;       // block of V, likewise
  float* row_buffer;  // one row of head_size
  float* max;         // running maximum of each row's logits
  float* sum;         // running Σ exp(logit − max)
  float* rescale;     // exp(old max − new max)
  float* first;       // keys [first, limit) of the current block are those that each row sees
  float* limit;
  std::int64_t pitch;
};

Workspace carve(float* scratch, std::int64_t head_size, bool has_mask) {
  Workspace w{};
  w.pitch = round_up(head_size, 16);
  const auto take = [&](std::int64_t floats) {
    float* start = scratch;
    scratch += round_up(floats, 16);
    return start;
  };
  w.query = take(kTileRows * head_size);
  w.out = take(kTileRows * head_size);
  w.logits = take(kTileRows * kTileKeys);
  w.bias = has_mask ? take(kTileRows * kTileKeys) : nullptr;
  w.key = take(kTileKeys * w.pitch);
  w.value = take(kTileKeys * w.pitch);
  w.row_buffer = take(w.pitch);
  w.mask_row = take(kTileKeys);
  w.max = take(kTileRows);
  w.sum = take(kTileRows);
  w.rescale = take(kTileRows);
  w.first = take(kTileRows);
  w.limit = take(kTileRows);
  return w;
}

std::int64_t scratch_floats(std::int64_t head_size, bool has_mask) {
  const std::int64_t pitch = round_up(head_size, 16);
  return 2 * round_up(kTileRows * head_size, 16) + (has_mask ? 2 : 1) * kTileRows * kTileKeys +
         (2 * kTileKeys + 1) * pitch + kTileKeys + 5 * kTileRows;
}

// --- Elements ---

std::int64_t element_bytes(ElementType type) {
  return type == ElementType::float32 ? 4 : type == ElementType::boolean ? 1 : 2;
}

const char* element_pointer(const void* base, ElementType type, std::int64_t index) {
  return static_cast<const char*>(base) + index * element_bytes(type);
}

Vec load_elements(const void* p, ElementType type) {
  if (type == ElementType::float32) return Simd::load(static_cast<const float*>(p));
  const auto* halves = static_cast<const std::uint16_t*>(p);
  return type == ElementType::float16 ? Simd::load_f16(halves) : Simd::load_bf16(halves);
}

// Widens one row of `count` elements to float32, in whole vectors of the destination. Returns 0 per lane, NaN where an
// element was NaN or infinite.
Vec widen_row(const char* source, ElementType type, std::int64_t count, float* destination) {
  const Vec zero = Simd::set1(0);
  Vec finite = zero;
  std::int64_t i = 0;
  for (; i + Simd::kWidth <= count; i += Simd::kWidth) {
    const Vec x = load_elements(source + i * element_bytes(type), type);
    Simd::store(destination + i, x);
    finite = Simd::fma(x, zero, finite);
  }
  if (i < count) {
    alignas(64) char tail[Simd::kWidth * 4] = {};
    std::memcpy(tail, source + i * element_bytes(type), static_cast<std::size_t>((count - i) * element_bytes(type)));
    const Vec x = load_elements(tail, type);
    Simd::store(destination + i, x);
    finite = Simd::fma(x, zero, finite);
  }
  return finite;
}

// Widens a block of K or V; true if all of it is finite.
bool widen_block(const void* base, ElementType type, std::int64_t first, std::int64_t stride, int rows,
                 std::int64_t count, float* destination, std::int64_t pitch) {
  Vec finite = Simd::set1(0);
  for (int i = 0; i < rows; ++i) {
    const char* source = element_pointer(base, type, first + i * stride);
    finite = Simd::add(finite, widen_row(source, type, count, destination + i * pitch));
  }
  return !Simd::any_nan(finite);
}

float load_mask_element(const void* mask, ElementType type, std::int64_t index) {
  const char* p = element_pointer(mask, type, index);
  if (type == ElementType::boolean) return *p != 0 ? 0 : -kInfinity;
  alignas(64) char padded[Simd::kWidth * 4] = {};
  alignas(64) float wide[Simd::kWidth];
  std::memcpy(padded, p, static_cast<std::size_t>(element_bytes(type)));
  Simd::store(wide, load_elements(padded, type));
  return wide[0];
}

// --- The micro-kernel ---

// c[m][lane] = c[m][lane] · rescale[lane] + Σ_k a[m · a_row + k · a_column] · b[k][lane] for M rows m and the lanes of
// a panel; without `rescale`, c starts from zero.
template <int M>
void multiply_rows(const float* a, std::int64_t a_row, std::int64_t a_column, const float* b, const float* rescale,
                   float* c, std::int64_t depth) {
  Vec sums[M][Simd::kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) {
      float* at = c + m * kLanes + v * Simd::kWidth;
      sums[m][v] =
          rescale == nullptr ? Simd::set1(0) : Simd::mul(Simd::load(at), Simd::load(rescale + v * Simd::kWidth));
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec row[Simd::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) row[v] = Simd::load(b + k * kLanes + v * Simd::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = Simd::set1(a[m * a_row + k * a_column]);
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = Simd::fma(x, row[v], sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) Simd::store(c + m * kLanes + v * Simd::kWidth, sums[m][v]);
  }
}

// All `rows` of c, in groups of kMaxRows and the rest.
void multiply(const float* a, std::int64_t a_row, std::int64_t a_column, const float* b, const float* rescale, float* c,
              std::int64_t rows, std::int64_t depth) {
  static_assert(Simd::kMaxRows == 6);
  std::int64_t m = 0;
  for (; m + 6 <= rows; m += 6) multiply_rows<6>(a + m * a_row, a_row, a_column, b, rescale, c + m * kLanes, depth);
  a += m * a_row;
  c += m * kLanes;
  switch (rows - m) {
    case 5:
      return multiply_rows<5>(a, a_row, a_column, b, rescale, c, depth);
    case 4:
      return multiply_rows<4>(a, a_row, a_column, b, rescale, c, depth);
    case 3:
      return multiply_rows<3>(a, a_row, a_column, b, rescale, c, depth);
    case 2:
      return multiply_rows<2>(a, a_row, a_column, b, rescale, c, depth);
    case 1:
      return multiply_rows<1>(a, a_row, a_column, b, rescale, c, depth);
    default:
      return;
  }
}

// --- Softmax ---

// e^x for x ≤ 0, within 2 units in the last place; 0 below −87.3, NaN for NaN. Cody and Waite's reduction, then a
// polynomial of degree 6 fitted to least relative error on ±ln 2 / 2.
Vec exp_negative(Vec x) {
  const Vec lowest = Simd::set1(-87.3F);
  const Vec clamped = Simd::max(lowest, x);  // x where x is NaN
  const Vec n = Simd::round(Simd::mul(clamped, Simd::set1(1.44269504F)));
  Vec r = Simd::fma(n, Simd::set1(-0.693359375F), clamped);
  r = Simd::fma(n, Simd::set1(2.12194440e-4F), r);
  Vec p = Simd::set1(0.0013814538F);
  p = Simd::fma(p, r, Simd::set1(0.0083687454F));
  p = Simd::fma(p, r, Simd::set1(0.041668389F));
  p = Simd::fma(p, r, Simd::set1(0.16666521F));
  p = Simd::fma(p, r, Simd::set1(0.49999994F));
  p = Simd::fma(p, Simd::mul(r, r), Simd::add(r, Simd::set1(1)));
  return Simd::select_less(x, lowest, Simd::set1(0), Simd::scale_by_power(p, n));
}

// Hides what the mask and the ranges hide in one panel of logits. Selects rather than adds: a hidden NaN must go.
void hide(float* logits, const float* bias, const float* first, const float* limit, int keys) {
  const Vec hidden = Simd::set1(-kInfinity);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    const Vec seen_from = Simd::load(first + v);
    const Vec seen_to = Simd::load(limit + v);
    for (int key = 0; key < keys; ++key) {
      float* at = logits + key * kLanes + v;
      Vec s = Simd::load(at);
      if (bias != nullptr) {
        const Vec b = Simd::load(bias + key * kLanes + v);
        s = Simd::select_equal(b, hidden, hidden, Simd::add(s, b));
      }
      const Vec position = Simd::set1(static_cast<float>(key));
      s = Simd::select_less(position, seen_from, hidden, s);
      Simd::store(at, Simd::select_less(position, seen_to, s, hidden));
    }
  }
}

// One panel of logits to probabilities relative to the new maximum; updates max and sum, leaves rescale.
void softmax(float* logits, float* max, float* sum, float* rescale, int keys) {
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec zero = Simd::set1(0);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    const Vec old_max = Simd::load(max + v);
    Vec new_max = old_max;
    for (int key = 0; key < keys; ++key) new_max = Simd::max(new_max, Simd::load(logits + key * kLanes + v));
    // A row that has seen no key yet: subtract 0, so that −∞ gives e^−∞ = 0 and not NaN.
    const Vec subtract = Simd::select_equal(new_max, hidden, zero, new_max);
    Vec total = zero;
    for (int key = 0; key < keys; ++key) {
      float* at = logits + key * kLanes + v;
      const Vec p = exp_negative(Simd::sub(Simd::load(at), subtract));
      total = Simd::add(total, p);
      Simd::store(at, p);
    }
    const Vec factor = exp_negative(Simd::sub(old_max, subtract));
    Simd::store(rescale + v, factor);
    Simd::store(sum + v, Simd::fma(Simd::load(sum + v), factor, total));
    Simd::store(max + v, new_max);
  }
}

// Oᵀ += Vᵀ · Pᵀ where V has NaN or Inf and some positions are hidden: 0 · NaN must not happen there. Slow and rare.
void accumulate_visible(const Workspace& w, float* out, const float* probabilities, const float* bias,
                        const float* first, const float* limit, const float* rescale, int keys,
                        std::int64_t head_size) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (std::int64_t d = 0; d < head_size; ++d) out[d * kLanes + lane] *= rescale[lane];
    for (int key = static_cast<int>(first[lane]); key < keys && static_cast<float>(key) < limit[lane]; ++key) {
      if (bias != nullptr && bias[key * kLanes + lane] == -kInfinity) continue;
      const float p = probabilities[key * kLanes + lane];
      for (std::int64_t d = 0; d < head_size; ++d) out[d * kLanes + lane] += p * w.value[key * w.pitch + d];
    }
  }
}

// --- The tile ---

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

float* lane_of(float* transposed, std::int64_t depth, int row) {
  return transposed + static_cast<std::int64_t>(row / kLanes) * depth * kLanes + row % kLanes;
}

void load_query(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w) {
  for (int row = 0; row < used_lanes(tile); ++row) {
    float* column = lane_of(w.query, problem.head_size, row);
    if (row < tile.rows) {
      const char* source = query_row(problem, tile.batch, position_of(problem, tile, row));
      widen_row(source, problem.type, problem.head_size, w.row_buffer);
    } else {
      std::memset(w.row_buffer, 0, static_cast<std::size_t>(problem.head_size) * sizeof(float));
    }
    for (std::int64_t d = 0; d < problem.head_size; ++d) column[d * kLanes] = w.row_buffer[d] * problem.scale;
  }
}

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

void load_bias(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w, const Mask& mask,
               std::int64_t first_key, int keys) {
  for (int row = 0; row < tile.rows; ++row) {
    RowPosition position = position_of(problem, tile, row);
    position.token -= mask.first_row;
    if (position.token >= 0 && position.token < mask.rows) {
      const std::int64_t first = offset_of(mask.strides, tile.batch, position) + first_key * mask.key_stride;
      load_mask_row(mask, first, keys, w.mask_row);
    } else {
      std::memset(w.mask_row, 0, sizeof(float) * kTileKeys);
    }
    float* column = lane_of(w.bias, kTileKeys, row);
    for (std::int64_t key = 0; key < keys; ++key) column[key * kLanes] = w.mask_row[key];
  }
}

// Each row's visible keys of the block that starts at `first_key`; true if some row does not see all of them.
bool load_limits(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w, const KeySegment& segment,
                 std::int64_t first_key, int keys) {
  bool limited = false;
  for (int row = 0; row < used_lanes(tile); ++row) {
    Visible visible{.begin = first_key, .end = first_key + keys};
    if (row < tile.rows) visible = visible_keys(problem, tile, segment, row);
    const std::int64_t begin = clamp(visible.begin - first_key, 0, keys);
    const std::int64_t end = clamp(visible.end - first_key, 0, keys);
    limited = limited || begin > 0 || end < keys;
    w.first[row] = static_cast<float>(begin);
    w.limit[row] = static_cast<float>(end);
  }
  return limited;
}

bool panel_sees_block(const Workspace& w, int panel) {
  for (int lane = panel * kLanes; lane < (panel + 1) * kLanes; ++lane) {
    if (w.first[lane] < w.limit[lane]) return true;
  }
  return false;
}

void store_out(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w) {
  for (int row = 0; row < tile.rows; ++row) {
    const RowPosition position = position_of(problem, tile, row);
    const float sum = w.sum[row];
    if (problem.lse != nullptr) {
      problem.lse[offset_of(problem.lse_strides, tile.batch, position)] =
          sum == 0 ? -kInfinity : w.max[row] + __builtin_logf(sum);
    }
    const float inverse = sum == 0 ? 0 : 1 / sum;
    const float* column = lane_of(w.out, problem.head_size, row);
    for (std::int64_t d = 0; d < problem.head_size; ++d) w.row_buffer[d] = column[d * kLanes] * inverse;
    char* target = const_cast<char*>(
        element_pointer(problem.out, problem.type, offset_of(problem.out_strides, tile.batch, position)));
    if (problem.type == ElementType::float32) {
      std::memcpy(target, w.row_buffer, static_cast<std::size_t>(problem.head_size) * sizeof(float));
      continue;
    }
    auto* halves = reinterpret_cast<std::uint16_t*>(target);
    for (std::int64_t d = 0; d < problem.head_size; ++d) {
      halves[d] = problem.type == ElementType::float16 ? to_f16(w.row_buffer[d]) : to_bf16(w.row_buffer[d]);
    }
  }
}

// One block of a segment's keys against all panels of the tile.
void attend_block(const AttentionProblem& problem, const FlashTile& tile, const Workspace& w, const KeySegment& segment,
                  std::int64_t first_key, int keys) {
  const std::int64_t depth = problem.head_size;
  const bool limited = load_limits(problem, tile, w, segment, first_key, keys);
  const bool masked = segment.mask.data != nullptr;
  if (masked) load_bias(problem, tile, w, segment.mask, first_key, keys);
  const auto load = [&](const void* base, const Strides& strides, float* destination) {
    const std::int64_t first = tile.batch * strides.batch + tile.kv_head * strides.head + first_key * strides.token;
    return widen_block(base, problem.type, first, strides.token, keys, depth, destination, w.pitch);
  };
  load(segment.key, segment.key_strides, w.key);
  const bool value_is_finite = load(segment.value, segment.value_strides, w.value);

  for (int panel = 0; panel * kLanes < tile.rows; ++panel) {
    if (limited && !panel_sees_block(w, panel)) continue;
    const std::int64_t row = static_cast<std::int64_t>(panel) * kLanes;
    float* logits = w.logits + row * kTileKeys;
    const float* bias = masked ? w.bias + row * kTileKeys : nullptr;
    multiply(w.key, w.pitch, 1, w.query + row * depth, nullptr, logits, keys, depth);
    if (limited || masked) hide(logits, bias, w.first + row, w.limit + row, keys);
    softmax(logits, w.max + row, w.sum + row, w.rescale + row, keys);
    float* out = w.out + row * depth;
    if ((limited || masked) && !value_is_finite) {
      accumulate_visible(w, out, logits, bias, w.first + row, w.limit + row, w.rescale + row, keys, depth);
    } else {
      multiply(w.value, 1, w.pitch, logits, w.rescale + row, out, depth, keys);
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
    attend_block(problem, tile, w, segment, key, static_cast<int>(end - key < kTileKeys ? end - key : kTileKeys));
  }
}

bool has_mask(const AttentionProblem& problem) {
  return problem.key_segments[0].mask.data != nullptr || problem.key_segments[1].mask.data != nullptr;
}

void run_tile(const AttentionProblem& problem, const FlashTile& tile, float* scratch) {
  const Workspace w = carve(scratch, problem.head_size, has_mask(problem));
  load_query(problem, tile, w);
  const auto lanes = static_cast<std::size_t>(used_lanes(tile));
  std::memset(w.out, 0, lanes * static_cast<std::size_t>(problem.head_size) * sizeof(float));
  if (w.bias != nullptr) std::memset(w.bias, 0, lanes * kTileKeys * sizeof(float));
  for (int row = 0; row < used_lanes(tile); ++row) {
    w.max[row] = -kInfinity;
    w.sum[row] = 0;
  }
  for (int i = 0; i < problem.num_key_segments; ++i) attend_segment(problem, tile, w, problem.key_segments[i]);
  store_out(problem, tile, w);
}

}  // namespace
}  // namespace ditattn::kernels::cpu
