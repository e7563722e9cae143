/// Quantizing one block of K and V to NVFP4 (docs/kernels/sage3.md), as operands of the products: numbers times their
/// groups' scales, the float32 scales apart. Included after nvfp4_impl.hpp.

#include <cstdint>
#include <cstring>

namespace ditattn::kernels::cpu {
namespace {

// Where the parts of a packed block lie, in floats.
struct Sage3Block {
  std::int64_t units;        // of a row of K: its strips have so many columns
  std::int64_t value_start;  // V's strips have channels as rows and units of keys as columns
  std::int64_t value_strip;
  std::int64_t correction;  // [query head of the group][key]: q̄ · (k − k̄); NaN where the key is not finite
  std::int64_t hidden;      // by key: 1 where no row sees it
  std::int64_t special;     // by key: 1 where V has NaN or Inf
  std::int64_t flags;       // [0]: keys that are not hidden; [1]: 1 where some V is special
  std::int64_t scales;      // [0]: K's; [1]: V's
  std::int64_t floats;
};

std::int64_t group_of(const AttentionProblem& problem) { return problem.heads / problem.kv_heads; }

Sage3Block sage3_block(const AttentionProblem& problem) {
  Sage3Block block{};
  Arena arena{.memory = nullptr};
  const auto take = [&](std::int64_t floats) {
    const std::int64_t start = arena.used;
    arena.take(floats);
    return start;
  };
  block.units = units_of(problem.head_size, Operands::kPack);
  take(strips_of(kTileKeys) * strip_floats(block.units) + strip_floats(Simd::kWidth));
  block.value_strip = strip_floats(units_of(kTileKeys, Operands::kPack));
  block.value_start = take(strips_of(problem.head_size) * block.value_strip);
  block.correction = take(group_of(problem) * kTileKeys);
  block.hidden = take(kTileKeys);
  block.special = take(kTileKeys);
  block.flags = take(2);
  block.scales = take(2);
  block.floats = arena.used;
  return block;
}

// --- Means ---

// `problem.means` has, for each of batch · kv_heads heads, rows of so many floats: K's, V's, and those of Q of the
// group's heads.
std::int64_t mean_pitch(const AttentionProblem& problem) { return round_up(problem.head_size, 16); }
const float* means_of(const AttentionProblem& problem, std::int64_t batch, std::int64_t kv_head) {
  return problem.means + (batch * problem.kv_heads + kv_head) * (2 + group_of(problem)) * mean_pitch(problem);
}

constexpr std::int64_t kRowFloats = kMostHeadSize + 2 * Simd::kWidth;  // of a row and whole units after it

// Sums over rows; of up to a block's at a time, so that long ones lose nothing.
struct ChannelTotals {
  alignas(64) float part[kRowFloats] = {};
  alignas(64) float sum[kRowFloats] = {};
  alignas(64) float largest[kRowFloats] = {};
  std::int64_t rows = 0;

  void add(const float* row, std::int64_t head_size) {
    for (std::int64_t x = 0; x < head_size; x += Simd::kWidth) {
      const Vec value = Simd::load(row + x);
      Simd::store(part + x, Simd::add(Simd::load(part + x), value));
      Simd::store(largest + x, Simd::max(Simd::load(largest + x), absolute(value)));
    }
    if (++rows % kTileKeys == 0) add_part();
  }
  void add_part() {
    for (std::int64_t x = 0; x < kRowFloats; x += Simd::kWidth) {
      Simd::store(sum + x, Simd::add(Simd::load(sum + x), Simd::load(part + x)));
      Simd::store(part + x, Simd::set1(0));
    }
  }
  // Where `all`, also means that are small beside a channel's largest number.
  void store_means(std::int64_t pitch, bool wanted, bool all, float* means) {
    add_part();
    const bool some = wanted && rows > (all ? 0 : kSage3LeastMean);
    for (std::int64_t d = 0; d < pitch; ++d) {
      const float mean = some ? sum[d] / static_cast<float>(rows) : 0;
      const bool counts = all || __builtin_fabsf(mean) * kSage3LeastMean >= largest[d];
      means[d] = counts ? mean : 0;
    }
  }
};

void find_sage3_means(const AttentionProblem& problem, std::int64_t head, Sage3Smoothing smoothing, float* means) {
  const std::int64_t batch = head / problem.kv_heads;
  const std::int64_t kv_head = head % problem.kv_heads;
  const std::int64_t pitch = mean_pitch(problem);
  alignas(64) float row[kRowFloats] = {};  // zeros past the head size
  ChannelTotals totals[2];
  for (int segment = 0; segment < problem.num_key_segments; ++segment) {
    for (std::int64_t i = 0; i < blocks_of(problem.key_segments[segment]); ++i) {
      const KeyBlock block{.batch = batch, .kv_head = kv_head, .segment = segment, .block = i};
      const BlockRows rows[2] = {key_rows(problem, block, false), key_rows(problem, block, true)};
      float hidden[kTileKeys];
      if (mark_hidden(problem, block, rows[0].keys, hidden) == 0) continue;
      for (int side = 0; side < 2; ++side) {
        if (!(side == 0 ? smoothing.key : smoothing.value)) continue;
        for (int key = 0; key < rows[side].keys; ++key) {
          if (hidden[key] == 0 && rows[side].load(key, row)) totals[side].add(row, problem.head_size);
        }
      }
    }
  }
  totals[0].store_means(pitch, smoothing.key, true, means);
  totals[1].store_means(pitch, smoothing.value, false, means + pitch);
  for (std::int64_t i = 0; i < group_of(problem); ++i) {
    ChannelTotals of_query;
    for (std::int64_t token = 0; token < problem.rows && smoothing.query; ++token) {
      const char* source = query_row(problem, batch, {.head = kv_head * group_of(problem) + i, .token = token});
      if (!Simd::any_nan(widen_row(source, problem.type, problem.head_size, row))) {
        of_query.add(row, problem.head_size);
      }
    }
    of_query.store_means(pitch, smoothing.query, false, means + (2 + i) * pitch);
  }
}

// --- K and V ---

// x less `mean`, zeros from head_size to `end`.
void subtract_mean(float* x, const float* mean, std::int64_t head_size, std::int64_t end) {
  for (std::int64_t i = 0; i < head_size; i += Simd::kWidth) {
    Simd::store(x + i, Simd::sub(Simd::load(x + i), Simd::load(mean + i)));
  }
  for (std::int64_t i = head_size; i < end; ++i) x[i] = 0;
}

// Groups of 16 successive numbers of a row, in place.
void quantize_row(float* x, std::int64_t count, Vec scale) {
  static_assert(kNvfp4Group % Simd::kWidth == 0);
  for (std::int64_t group = 0; group < count; group += kNvfp4Group) {
    Vec largest = Simd::set1(0);
    for (int i = 0; i < kNvfp4Group; i += Simd::kWidth) {
      largest = Simd::max(largest, absolute(Simd::load(x + group + i)));
    }
    const GroupScale numbers(Simd::set1(Simd::largest(largest)), scale);
    for (int i = 0; i < kNvfp4Group; i += Simd::kWidth) {
      Simd::store(x + group + i, numbers.apply(Simd::load(x + group + i)));
    }
  }
}

// K's row less the mean, and zeros up to whole units and groups. False: hidden, or not finite, and all zeros.
bool load_key_row(const BlockRows& rows, const Sage3Block& layout, const float* packed, const float* mean, int key,
                  float* row) {
  const std::int64_t end = kRowFloats;
  const bool usable = packed[layout.hidden + key] == 0 && rows.load(key, row);
  if (usable) {
    subtract_mean(row, mean, rows.head_size, end);
  } else {
    std::memset(row, 0, static_cast<std::size_t>(end) * sizeof(float));
  }
  return usable;
}

float dot(const float* a, const float* b, std::int64_t count) {
  Vec sum = Simd::set1(0);
  for (std::int64_t i = 0; i < count; i += Simd::kWidth) {
    sum = Simd::fma(Simd::load(a + i), Simd::load(b + i), sum);
  }
  alignas(64) float lanes[Simd::kWidth];
  Simd::store(lanes, sum);
  float total = 0;
  for (const float lane : lanes) total += lane;
  return total;
}

void quantize_sage3_keys(const AttentionProblem& problem, const BlockRows& rows, const Sage3Block& layout,
                         const float* means, float* staged, std::int64_t pitch, float* packed) {
  alignas(64) float row[kRowFloats];
  Vec largest = Simd::set1(0);
  for (int key = 0; key < rows.keys; ++key) {
    const bool usable = load_key_row(rows, layout, packed, means, key, row);
    for (std::int64_t i = 0; i < rows.head_size; i += Simd::kWidth) {
      largest = Simd::max(largest, absolute(Simd::load(row + i)));
    }
    for (std::int64_t head = 0; head < group_of(problem); ++head) {
      const float* query_mean = means + (2 + head) * mean_pitch(problem);
      const float correction = usable ? dot(query_mean, row, mean_pitch(problem)) * problem.scale * kLog2E : 0;
      // NaN and Inf show as NaN in all rows that see the key.
      const bool broken = !usable && packed[layout.hidden + key] == 0;
      packed[layout.correction + head * kTileKeys + key] = broken ? __builtin_nanf("") : correction;
    }
  }
  const Vec scale = tensor_scale(Simd::set1(Simd::largest(largest)));
  Simd::store(row, scale);
  packed[layout.scales] = row[0];
  for (int key = 0; key < rows.keys; ++key) {
    load_key_row(rows, layout, packed, means, key, row);
    quantize_row(row, rows.head_size, scale);
    const int in_strip = key % kStripRows;
    Operands::pack_row(row, layout.units * Operands::kPack, staged + in_strip * pitch);
    if (in_strip + 1 < kStripRows && key + 1 < rows.keys) continue;
    rows_to_strip(staged, pitch, layout.units, packed + key / kStripRows * strip_floats(layout.units));
  }
}

void quantize_sage3_values(const BlockRows& rows, const Sage3Block& layout, const float* mean, float* staged,
                           std::int64_t pitch, float* packed) {
  // The block less the mean; what is hidden is zero, and of the rest what is not finite is less the mean too, as the
  // output gets that back.
  const std::int64_t row_floats = round_up(rows.head_size, 16);
  alignas(64) float values[kTileKeys * kMostHeadSize];
  const auto keys = static_cast<int>(round_up(rows.keys, kNvfp4Group));
  Vec largest = Simd::set1(0);
  for (int key = 0; key < keys; ++key) {
    float* row = values + key * row_floats;
    load_value_row(rows, layout, key, packed, row);
    const bool hides = key >= rows.keys || packed[layout.hidden + key] != 0;
    for (std::int64_t x = 0; x < rows.head_size && !hides; x += Simd::kWidth) {
      Simd::store(row + x, Simd::sub(Simd::load(row + x), Simd::load(mean + x)));
    }
    for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) {
      largest = Simd::max(largest, absolute(Simd::load(row + x)));
    }
  }
  const Vec scale = tensor_scale(Simd::set1(Simd::largest(largest)));
  alignas(64) float lanes[Simd::kWidth];
  Simd::store(lanes, scale);
  packed[layout.scales + 1] = lanes[0];
  for (int group = 0; group < keys; group += kNvfp4Group) {
    for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) {
      float* at = values + group * row_floats + x;
      Vec group_largest = Simd::set1(0);
      for (int i = 0; i < kNvfp4Group; ++i) {
        group_largest = Simd::max(group_largest, absolute(Simd::load(at + i * row_floats)));
      }
      const GroupScale numbers(group_largest, scale);
      for (int i = 0; i < kNvfp4Group; ++i) {
        Simd::store(at + i * row_floats, numbers.apply(Simd::load(at + i * row_floats)));
      }
    }
  }
  const auto units = static_cast<int>(units_of(rows.keys, Operands::kPack));
  for (int unit = 0; unit < units; ++unit) {
    float* column = staged + unit % kStripColumns * pitch;
    for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) {
      Vec numbers[Operands::kPack];
      for (int i = 0; i < Operands::kPack; ++i) {
        const int key = unit * Operands::kPack + i;
        numbers[i] = key < keys ? Simd::load(values + key * row_floats + x) : Simd::set1(0);
      }
      Operands::store_packed(column + x, numbers);
    }
    if ((unit + 1) % kStripColumns != 0) continue;
    columns_to_strips(staged, pitch, unit + 1 - kStripColumns, rows.head_size, layout.value_strip,
                      packed + layout.value_start);
  }
}

void pack_sage3_block(const AttentionProblem& problem, const KeyBlock& block, float* packed, float* staged,
                      std::int64_t pitch) {
  const Sage3Block layout = sage3_block(problem);
  const BlockRows keys = key_rows(problem, block, false);
  const int seen = mark_hidden(problem, block, keys.keys, packed + layout.hidden);
  packed[layout.flags] = static_cast<float>(seen);
  packed[layout.flags + 1] = 0;
  if (seen == 0) return;
  const float* means = means_of(problem, block.batch, block.kv_head);
  quantize_sage3_keys(problem, keys, layout, means, staged, pitch, packed);
  quantize_sage3_values(key_rows(problem, block, true), layout, means + mean_pitch(problem), staged, pitch, packed);
}

}  // namespace
}  // namespace ditattn::kernels::cpu
