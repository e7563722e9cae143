// Background: the "math" path of PyTorch's scaled_dot_product_attention. Approach: the logits of kBlockRows query rows
// and all their keys, softmax over whole rows, then P · V; K and V are converted to float32 one tile of kTileKeys at a
// time. Both products run through one small matrix multiplication. Rejected: an online softmax, which is FLASH_ATTN's
// way; this engine stays the plain one that others are compared with.

#include "kernels/cpu/sdpa_native.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "kernels/cpu/half.hpp"

namespace ditattn::kernels::cpu {
namespace {

constexpr std::int64_t kBlockRows = 32;
constexpr std::int64_t kTileKeys = 64;
constexpr std::int64_t kMicroRows = 4;
constexpr std::int64_t kMicroColumns = 8;
constexpr std::int64_t kDepth = 64;  // longest sum in one accumulator: bounds the rounding error of long sums
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

// Elements [first, first + count) of `data`, `step` apart, as float32.
void load_row(const void* data, ElementType type, std::int64_t first, std::int64_t count, float* to,
              std::int64_t step) {
  const auto copy = [&](const auto* from, auto convert) {
    for (std::int64_t i = 0; i < count; ++i) to[i * step] = convert(from[first + i]);
  };
  if (type == ElementType::bfloat16) return copy(static_cast<const std::uint16_t*>(data), from_bf16);
  if (type == ElementType::float16) return copy(static_cast<const std::uint16_t*>(data), from_f16);
  copy(static_cast<const float*>(data), [](float value) { return value; });
}

void store_row(void* data, ElementType type, std::int64_t first, std::int64_t count, const float* from) {
  const auto copy = [&](auto* to, auto convert) {
    for (std::int64_t i = 0; i < count; ++i) to[first + i] = convert(from[i]);
  };
  if (type == ElementType::bfloat16) return copy(static_cast<std::uint16_t*>(data), to_bf16);
  if (type == ElementType::float16) return copy(static_cast<std::uint16_t*>(data), to_f16);
  copy(static_cast<float*>(data), [](float value) { return value; });
}

struct Matrix {
  float* data;
  std::int64_t stride;  // between rows
};

// Four floats that compilers keep in one register of any baseline (SSE2, NEON); a plain array of sums they spill.
using Vec [[gnu::vector_size(16)]] = float;
constexpr std::int64_t kVecWidth = 4;
constexpr std::int64_t kMicroVecs = kMicroColumns / kVecWidth;

// Rows start anywhere: a segment's first key need not be a multiple of four.
Vec load(const float* from) {
  Vec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}

void add_to(float* to, Vec vec) {
  vec += load(to);
  std::memcpy(to, &vec, sizeof vec);
}

// c += a · b for `rows` × `depth` times `depth` × `columns`; rows and columns are padded to the micro-tile's size.
void multiply_add(Matrix a, Matrix b, Matrix c, std::int64_t rows, std::int64_t depth, std::int64_t columns) {
  for (std::int64_t column = 0; column < columns; column += kMicroColumns) {
    for (std::int64_t row = 0; row < rows; row += kMicroRows) {
      Vec sums[kMicroRows][kMicroVecs] = {};
      for (std::int64_t k = 0; k < depth; ++k) {
        const float* b_row = b.data + k * b.stride + column;
        for (std::int64_t r = 0; r < kMicroRows; ++r) {
          const float a_value = a.data[(row + r) * a.stride + k];
          for (std::int64_t i = 0; i < kMicroVecs; ++i) sums[r][i] += a_value * load(b_row + i * kVecWidth);
        }
      }
      for (std::int64_t r = 0; r < kMicroRows; ++r) {
        float* c_row = c.data + (row + r) * c.stride + column;
        for (std::int64_t i = 0; i < kMicroVecs; ++i) add_to(c_row + i * kVecWidth, sums[r][i]);
      }
    }
  }
}

// Largest element that is not NaN; −∞ if there is none.
float largest(const float* row, std::int64_t count) {
  float lanes[kMicroColumns];
  std::fill_n(lanes, kMicroColumns, -kInfinity);
  std::int64_t i = 0;
  for (; i + kMicroColumns <= count; i += kMicroColumns) {
    for (std::int64_t l = 0; l < kMicroColumns; ++l) lanes[l] = row[i + l] > lanes[l] ? row[i + l] : lanes[l];
  }
  for (; i < count; ++i) lanes[0] = row[i] > lanes[0] ? row[i] : lanes[0];
  return *std::max_element(lanes, lanes + kMicroColumns);
}

// Where things lie in one slot's scratch, in floats.
struct Scratch {
  explicit Scratch(const AttentionProblem& problem)
      : depth(round_up(problem.head_size, kMicroColumns)),
        keys(round_up(problem.keys, kTileKeys) + kTileKeys),  // a tile may start anywhere
        tile(kBlockRows * depth),
        sums(tile + kTileKeys * depth),
        logits(sums + kBlockRows * depth),
        total(logits + kBlockRows * keys) {}
  std::int64_t depth;                      // padded head size
  std::int64_t keys;                       // padded number of keys
  std::int64_t tile, sums, logits, total;  // the query block comes first
};

// One block of query rows of one head.
class Block {
 public:
  Block(const AttentionProblem& problem, std::int64_t batch, std::int64_t head, std::int64_t first, float* scratch)
      : p_(problem),
        layout_(problem),
        batch_(batch),
        head_(head),
        first_(first),
        rows_(std::min(kBlockRows, problem.rows - first)),
        padded_rows_(round_up(rows_, kMicroRows)),
        kv_head_(head / (problem.heads / problem.kv_heads)),
        keys_(last_key()),
        query_{scratch, layout_.depth},
        tile_(scratch + layout_.tile),
        sums_{scratch + layout_.sums, layout_.depth},
        logits_{scratch + layout_.logits, layout_.keys} {}

  void run() {
    load_query();
    compute_logits();
    for (std::int64_t row = 0; row < rows_; ++row) {
      mask_row(row);
      softmax_row(row);
    }
    multiply_values();
    for (std::int64_t row = 0; row < rows_; ++row) write_row(row);
  }

 private:
  // Keys [begin, end) of a segment, relative to it, that row `row` of the block may see, masks aside.
  struct Visible {
    std::int64_t begin;
    std::int64_t end;
  };

  [[nodiscard]] Visible visible(const KeySegment& segment, std::int64_t row) const {
    const auto bounded = [&](std::int64_t key, std::int64_t limit) { return std::clamp<std::int64_t>(key, 0, limit); };
    std::int64_t length = segment.keys;
    if (segment.lengths != nullptr) {
      length = bounded(segment.lengths[batch_ * segment.length_stride] - segment.length_offset, segment.keys);
    }
    const std::int64_t token = first_ + row;
    if (p_.ranges != nullptr) {
      const std::int64_t* range = p_.ranges + batch_ * p_.range_batch_stride + 2 * token;
      return {.begin = bounded(range[0] - segment.first_key, length),
              .end = bounded(range[1] - segment.first_key, length)};
    }
    return {.begin = 0, .end = p_.causal ? bounded(token + p_.causal_offset + 1 - segment.first_key, length) : length};
  }

  // One past the last key that any row of the block may see, over all segments.
  [[nodiscard]] std::int64_t last_key() const {
    std::int64_t last = 0;
    for (int i = 0; i < p_.num_key_segments; ++i) {
      const KeySegment& segment = p_.key_segments[i];
      for (std::int64_t row = 0; row < rows_; ++row) {
        const Visible seen = visible(segment, row);
        if (seen.begin < seen.end) last = std::max(last, segment.first_key + seen.end);
      }
    }
    return last;
  }

  // Calls use(segment, first key of the tile relative to it, keys in the tile) for all tiles up to `keys_`.
  template <class Use>
  void for_each_tile(Use use) const {
    for (int i = 0; i < p_.num_key_segments; ++i) {
      const KeySegment& segment = p_.key_segments[i];
      const std::int64_t end = std::min(segment.keys, keys_ - segment.first_key);
      for (std::int64_t first = 0; first < end; first += kTileKeys)
        use(segment, first, std::min(kTileKeys, end - first));
    }
  }

  void load_query() {
    std::fill_n(query_.data, padded_rows_ * query_.stride, 0.F);
    for (std::int64_t row = 0; row < rows_; ++row) {
      const std::int64_t token = first_ + row;
      const QuerySegment& segment = p_.queries[p_.num_queries == 2 && token >= p_.queries[1].first_row ? 1 : 0];
      const Strides& s = segment.strides;
      load_row(segment.data, p_.type, batch_ * s.batch + (token - segment.first_row) * s.token + head_ * s.head,
               p_.head_size, query_.data + row * query_.stride, 1);
    }
  }

  [[nodiscard]] std::int64_t kv_offset(const Strides& s, std::int64_t key) const {
    return batch_ * s.batch + key * s.token + kv_head_ * s.head;
  }

  // A tile that is not full also clears logits past it: the next segment's are computed after, the rest is hidden.
  void compute_logits() {
    for_each_tile([&](const KeySegment& segment, std::int64_t first, std::int64_t count) {
      if (count < kTileKeys) std::fill_n(tile_, kTileKeys * p_.head_size, 0.F);
      for (std::int64_t key = 0; key < count; ++key) {  // the tile is Kᵀ
        load_row(segment.key, p_.type, kv_offset(segment.key_strides, first + key), p_.head_size, tile_ + key,
                 kTileKeys);
      }
      const Matrix logits{logits_.data + segment.first_key + first, logits_.stride};
      for (std::int64_t row = 0; row < padded_rows_; ++row) {
        std::fill_n(logits.data + row * logits.stride, kTileKeys, 0.F);
      }
      for (std::int64_t d = 0; d < p_.head_size; d += kDepth) {
        multiply_add({query_.data + d, query_.stride}, {tile_ + d * kTileKeys, kTileKeys}, logits, padded_rows_,
                     std::min(kDepth, p_.head_size - d), kTileKeys);
      }
    });
  }

  // Calls use(key, value added to the logit) for the segment's keys [first, end) of `row`; −∞ hides.
  template <class Use>
  void read_mask(const Mask& mask, std::int64_t row, std::int64_t first, std::int64_t end, Use use) const {
    const std::int64_t mask_row = first_ + row - mask.first_row;
    if (mask.data == nullptr || mask_row < 0 || mask_row >= mask.rows) return;
    const std::int64_t offset = batch_ * mask.strides.batch + mask_row * mask.strides.token + head_ * mask.strides.head;
    const auto read = [&](const auto* data, auto convert) {
      for (std::int64_t key = first; key < end; ++key) use(key, convert(data[offset + key * mask.key_stride]));
    };
    switch (mask.type) {
      case ElementType::boolean:
        return read(static_cast<const std::uint8_t*>(mask.data),
                    [](std::uint8_t seen) { return seen != 0 ? 0.F : -kInfinity; });
      case ElementType::bfloat16:
        return read(static_cast<const std::uint16_t*>(mask.data), from_bf16);
      case ElementType::float16:
        return read(static_cast<const std::uint16_t*>(mask.data), from_f16);
      case ElementType::float32:
        return read(static_cast<const float*>(mask.data), [](float value) { return value; });
    }
  }

  // Scale and mask; what stands in hidden places (NaN too) is overwritten.
  void mask_row(std::int64_t row) {
    float* logits = logits_.data + row * logits_.stride;
    for (int i = 0; i < p_.num_key_segments; ++i) {
      const KeySegment& segment = p_.key_segments[i];
      float* own = logits + segment.first_key;
      const Visible seen = visible(segment, row);
      const std::int64_t end = std::max(seen.begin, std::min(seen.end, keys_ - segment.first_key));
      std::fill(own, own + seen.begin, -kInfinity);
      for (std::int64_t key = seen.begin; key < end; ++key) own[key] *= p_.scale;
      read_mask(segment.mask, row, seen.begin, end,
                [&](std::int64_t key, float value) { own[key] = value == -kInfinity ? -kInfinity : own[key] + value; });
      std::fill(own + end, own + segment.keys, -kInfinity);
    }
    std::fill(logits + p_.keys, logits + logits_.stride, -kInfinity);
  }

  // Logits become exp(logit − largest); their sum is kept. A row without keys, or with none but −∞ (as in PyTorch's
  // safe softmax), becomes zeros.
  void softmax_row(std::int64_t row) {
    float* logits = logits_.data + row * logits_.stride;
    const std::int64_t end = round_up(keys_, kTileKeys);
    const float max = largest(logits, end);
    const bool has_keys = max > -kInfinity || std::any_of(logits, logits + end, [](float x) { return std::isnan(x); });
    if (!has_keys) {
      std::fill_n(logits, end, 0.F);
      weights_[row] = 0;
    } else {
      float lanes[kMicroColumns] = {};
      double sum = 0;
      for (std::int64_t first = 0; first < end; first += kTileKeys) {
        for (std::int64_t i = 0; i < kTileKeys; ++i) logits[first + i] = std::exp(logits[first + i] - max);
        std::fill_n(lanes, kMicroColumns, 0.F);
        for (std::int64_t i = 0; i < kTileKeys; ++i) lanes[i % kMicroColumns] += logits[first + i];
        for (float lane : lanes) sum += lane;
      }
      weights_[row] = sum;
    }
    if (p_.lse != nullptr) {
      const Strides& s = p_.lse_strides;
      p_.lse[batch_ * s.batch + head_ * s.head + (first_ + row) * s.token] =
          has_keys ? static_cast<float>(max + std::log(weights_[row])) : -kInfinity;
    }
  }

  void multiply_values() {
    std::fill_n(sums_.data, padded_rows_ * sums_.stride, 0.F);
    for (std::int64_t row = rows_; row < padded_rows_; ++row) {
      std::fill_n(logits_.data + row * logits_.stride, round_up(keys_, kTileKeys), 0.F);
    }
    for_each_tile([&](const KeySegment& segment, std::int64_t first, std::int64_t count) {
      std::int64_t odd_keys[kTileKeys];  // those with NaN or Inf in V: hidden ones must not become 0 · NaN
      std::int64_t odd_count = 0;
      for (std::int64_t key = 0; key < count; ++key) {
        float* value = tile_ + key * layout_.depth;
        load_row(segment.value, p_.type, kv_offset(segment.value_strides, first + key), p_.head_size, value, 1);
        std::fill(value + p_.head_size, value + layout_.depth, 0.F);
        if (!std::all_of(value, value + p_.head_size, [](float x) { return std::isfinite(x); })) {
          odd_keys[odd_count++] = first + key;
          std::fill_n(value, p_.head_size, 0.F);
        }
      }
      multiply_add({logits_.data + segment.first_key + first, logits_.stride}, {tile_, layout_.depth}, sums_,
                   padded_rows_, count, layout_.depth);
      for (std::int64_t i = 0; i < odd_count; ++i) add_odd_key(segment, odd_keys[i]);
    });
  }

  // P · V of one key for the rows that see it; the tile is free to use.
  void add_odd_key(const KeySegment& segment, std::int64_t key) {
    load_row(segment.value, p_.type, kv_offset(segment.value_strides, key), p_.head_size, tile_, 1);
    for (std::int64_t row = 0; row < rows_; ++row) {
      const Visible range = visible(segment, row);
      bool seen = key >= range.begin && key < range.end;
      read_mask(segment.mask, row, key, key + 1,
                [&](std::int64_t /*key*/, float value) { seen = seen && value != -kInfinity; });
      if (!seen) continue;
      const float probability = logits_.data[row * logits_.stride + segment.first_key + key];
      for (std::int64_t d = 0; d < p_.head_size; ++d) sums_.data[row * sums_.stride + d] += probability * tile_[d];
    }
  }

  void write_row(std::int64_t row) {
    float* sums = sums_.data + row * sums_.stride;
    const auto factor = static_cast<float>(weights_[row] == 0 ? 0 : 1 / weights_[row]);
    for (std::int64_t d = 0; d < p_.head_size; ++d) sums[d] *= factor;
    const Strides& s = p_.out_strides;
    store_row(p_.out, p_.type, batch_ * s.batch + (first_ + row) * s.token + head_ * s.head, p_.head_size, sums);
  }

  const AttentionProblem& p_;
  Scratch layout_;
  std::int64_t batch_, head_, first_, rows_, padded_rows_, kv_head_;
  std::int64_t keys_;  // that any row of the block may see
  Matrix query_;
  float* tile_;
  Matrix sums_;
  Matrix logits_;
  double weights_[kBlockRows] = {};  // sums of exp(logit − largest)
};

// Slots take blocks from one counter until none is left; each has its own scratch.
struct Run {
  const AttentionProblem& problem;
  std::int64_t blocks_per_head;
  std::int64_t blocks;
  std::int64_t scratch_per_slot;
  float* scratch;
  std::atomic<std::int64_t> next{0};

  void work(std::int64_t slot) {
    for (std::int64_t i = next++; i < blocks; i = next++) {
      const std::int64_t head = i / blocks_per_head;
      Block(problem, head / problem.heads, head % problem.heads, i % blocks_per_head * kBlockRows,
            scratch + slot * scratch_per_slot)
          .run();
    }
  }
};

}  // namespace

void sdpa_native(const AttentionProblem& problem, const Executor& executor) {
  const std::int64_t blocks_per_head = (problem.rows + kBlockRows - 1) / kBlockRows;
  const std::int64_t blocks = problem.batch * problem.heads * blocks_per_head;
  const std::int64_t slots = std::min<std::int64_t>(executor.threads, blocks);
  const std::int64_t per_slot = Scratch(problem).total;
  const auto scratch = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(slots * per_slot));
  Run run{.problem = problem,
          .blocks_per_head = blocks_per_head,
          .blocks = blocks,
          .scratch_per_slot = per_slot,
          .scratch = scratch.get()};
  executor.parallel_for(
      slots, [](void* context, std::int64_t slot) { static_cast<Run*>(context)->work(slot); }, &run);
}

}  // namespace ditattn::kernels::cpu
