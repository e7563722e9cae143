/// Quantizing one block of K and V (SageAttention 2: Zhang et al., arXiv 2411.10958), per block of kTileKeys keys:
///   K − its channels' mean over the block, one scale per key; V, one scale per channel.
/// Upstream takes the mean over the whole sequence, which the softmax does not see. Here Q · mean is added back in
/// float32, one dot product per row and block: so the LSE is the true one, keys are read once, and no block's numbers
/// depend on another's. What no row of the problem sees takes no part; within a block, keys that other rows see do.
/// Included after block_rows_impl.hpp and sage_products_impl.hpp.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

// x / scale is a whole number of at most `most`, but zero where x are too small for a scale.
Vec inverse_scale(Vec largest, float most) {
  return Simd::select_less(Simd::set1(1e-30F), largest, Simd::div(Simd::set1(most), largest), Simd::set1(0));
}

// Where the parts of a packed block lie, in floats.
struct SageBlock {
  std::int64_t units;        // of a row of K: its strips have so many columns
  std::int64_t value_start;  // V's strips have channels as rows and units of keys as columns
  std::int64_t value_strip;
  std::int64_t key_scale;
  std::int64_t value_scale;
  std::int64_t mean;
  std::int64_t hidden;   // by key: 1 where no row sees it
  std::int64_t special;  // by key: 1 where V has NaN or Inf
  std::int64_t flags;    // [0]: keys that are not hidden; [1]: 1 where some V is special
  std::int64_t floats;
};

template <class Values>
SageBlock sage_block(std::int64_t head_size) {
  SageBlock block{};
  Arena arena{.memory = nullptr};
  const auto take = [&](std::int64_t floats) {
    const std::int64_t start = arena.used;
    arena.take(floats);
    return start;
  };
  block.units = units_of(head_size, Dots::kPack);
  take(strips_of(kTileKeys) * strip_floats(block.units) + strip_floats(Simd::kWidth));
  block.value_strip = strip_floats(units_of(kTileKeys, Values::kPack));
  block.value_start = take(strips_of(head_size) * block.value_strip);
  block.key_scale = take(kTileKeys);
  block.value_scale = take(round_up(head_size, 16));
  block.mean = take(round_up(head_size, 16));
  block.hidden = take(kTileKeys);
  block.special = take(kTileKeys);
  block.flags = take(2);
  block.floats = arena.used;
  return block;
}

// Mean of each channel over the keys that are seen and finite.
void find_mean(const BlockRows& rows, const float* hidden, int seen, float* mean) {
  alignas(64) float row[kMostHeadSize + Simd::kWidth];
  for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) Simd::store(mean + x, Simd::set1(0));
  const Vec share = Simd::set1(seen > 0 ? 1 / static_cast<float>(seen) : 0);
  for (int key = 0; key < rows.keys; ++key) {
    if (hidden[key] != 0 || !rows.load(key, row)) continue;
    for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) {
      Simd::store(mean + x, Simd::fma(Simd::load(row + x), share, Simd::load(mean + x)));
    }
  }
}

// Quantizes the rows staged (kStripRows of `pitch`) in place, less the mean: numbers in units. Leaves each row's scale.
void quantize_rows(float* staged, std::int64_t pitch, int count, const float* mean, std::int64_t head_size,
                   float* scales) {
  constexpr auto most = static_cast<float>(Dots::kKeyMost);
  for (int row = 0; row < count; ++row) {
    float* x = staged + row * pitch;
    Vec largest = Simd::set1(0);
    for (std::int64_t i = 0; i < head_size; i += Simd::kWidth) {
      const Vec smooth = Simd::sub(Simd::load(x + i), Simd::load(mean + i));
      Simd::store(x + i, smooth);
      largest = Simd::max(largest, absolute(smooth));
    }
    const float bound = Simd::largest(largest);
    scales[row] = bound / most;
    const Vec inverse = inverse_scale(Simd::set1(bound), most);
    const Vec offset = Simd::set1(Dots::kKeyOffset);
    // In place: numbers take no more room than what they are made of.
    for (std::int64_t i = 0; i < head_size; i += Simd::kWidth) {
      Dots::store_row(x, i, Simd::fma(Simd::load(x + i), inverse, offset));
    }
  }
}

void quantize_keys(const BlockRows& rows, const SageBlock& layout, const float* hidden, float* staged,
                   std::int64_t pitch, float* packed) {
  for (int first = 0; first < rows.keys; first += kStripRows) {
    const int count = rows.keys - first < kStripRows ? rows.keys - first : kStripRows;
    bool usable[kStripRows];
    for (int row = 0; row < count; ++row) {
      float* x = staged + row * pitch;
      usable[row] = hidden[first + row] == 0 && rows.load(first + row, x);
      if (usable[row]) continue;
      std::memcpy(x, packed + layout.mean, static_cast<std::size_t>(round_up(rows.head_size, 16)) * sizeof(float));
    }
    float* scales = packed + layout.key_scale + first;
    quantize_rows(staged, pitch, count, packed + layout.mean, rows.head_size, scales);
    for (int row = 0; row < count; ++row) {  // NaN and Inf show as NaN in all rows that see the key
      if (!usable[row] && hidden[first + row] == 0) scales[row] = __builtin_nanf("");
    }
    rows_to_strip(staged, pitch, layout.units, packed + first / kStripRows * strip_floats(layout.units));
  }
}

void quantize_values(const BlockRows& rows, const SageBlock& layout, float* staged, std::int64_t pitch, float* packed) {
  constexpr float most = 127;
  alignas(64) float inverse[kMostHeadSize + Simd::kWidth];
  for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) Simd::store(inverse + x, Simd::set1(0));
  for (int key = 0; key < rows.keys; ++key) {
    load_value_row(rows, layout, key, packed, staged);
    for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) {
      Simd::store(inverse + x, Simd::max(Simd::load(inverse + x), absolute(Simd::load(staged + x))));
    }
  }
  for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) {
    const Vec largest = Simd::load(inverse + x);
    Simd::store(packed + layout.value_scale + x, Simd::mul(largest, Simd::set1(1 / most)));
    Simd::store(inverse + x, inverse_scale(largest, most));
  }
  constexpr std::int64_t row_floats = kMostHeadSize + Simd::kWidth;
  alignas(64) float row[Dots::kPack * row_floats];
  const auto units = static_cast<int>(units_of(rows.keys, Dots::kPack));
  for (int unit = 0; unit < units; ++unit) {
    for (int i = 0; i < Dots::kPack; ++i) {
      load_value_row(rows, layout, unit * Dots::kPack + i, packed, row + i * row_floats);
    }
    float* column = staged + unit % kStripColumns * pitch;
    for (std::int64_t x = 0; x < rows.head_size; x += Simd::kWidth) {
      Vec numbers[Dots::kPack];
      for (int i = 0; i < Dots::kPack; ++i) {
        numbers[i] = Simd::mul(Simd::load(row + i * row_floats + x), Simd::load(inverse + x));
      }
      Simd::store(column + x, Dots::join(numbers));
    }
    if ((unit + 1) % kStripColumns != 0) continue;
    columns_to_strips(staged, pitch, unit + 1 - kStripColumns, rows.head_size, layout.value_strip,
                      packed + layout.value_start);
  }
}

void keep_values(const BlockRows& rows, const SageBlock& layout, float* staged, float* packed) {
  for (int key = 0; key < rows.keys; ++key) {
    load_value_row(rows, layout, key, packed, staged);
    columns_to_strips(staged, 0, key, rows.head_size, layout.value_strip, packed + layout.value_start);
  }
}

template <class Values>
void pack_sage_block(const AttentionProblem& problem, const KeyBlock& block, float* packed, float* staged,
                     std::int64_t pitch) {
  const SageBlock layout = sage_block<Values>(problem.head_size);
  const BlockRows keys = key_rows(problem, block, false);
  float* hidden = packed + layout.hidden;
  const int seen = mark_hidden(problem, block, keys.keys, hidden);
  packed[layout.flags] = static_cast<float>(seen);
  packed[layout.flags + 1] = 0;
  if (seen == 0) return;
  if (problem.smooth_key) {
    find_mean(keys, hidden, seen, packed + layout.mean);
  } else {
    std::memset(packed + layout.mean, 0, static_cast<std::size_t>(round_up(problem.head_size, 16)) * sizeof(float));
  }
  quantize_keys(keys, layout, hidden, staged, pitch, packed);
  const BlockRows values = key_rows(problem, block, true);
  if constexpr (Values::kQuantized) {
    quantize_values(values, layout, staged, pitch, packed);
  } else {
    keep_values(values, layout, staged, packed);
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu
