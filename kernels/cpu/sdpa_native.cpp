// Background: the "math" path of PyTorch's scaled_dot_product_attention. Approach: the logits of kBlockRows query rows
// and all their keys, softmax over whole rows, then P · V; K and V are converted to float32 one tile of kTileKeys at a
// time. Both products run through one small matrix multiplication. Rejected: an online softmax, which is FLASH_ATTN's
// way; this engine stays the plain one that others are compared with.

#include "kernels/cpu/sdpa_native.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>

namespace ditattn::kernels::cpu {
namespace {

constexpr std::int64_t kBlockRows = 32;
constexpr std::int64_t kTileKeys = 64;
constexpr std::int64_t kMicroRows = 4;
constexpr std::int64_t kMicroColumns = 8;
constexpr std::int64_t kDepth = 64;  // longest sum in one accumulator: bounds the rounding error of long sums
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

// The exponent is rebased by a multiplication, which renormalises subnormals too; Inf and NaN get theirs set.
float from_f16(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7FFFU;
  const float rebased = std::bit_cast<float>(magnitude << 13) * 0x1p112F;
  const std::uint32_t special = magnitude > 0x7BFFU ? 0x7F800000U : 0U;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(rebased) | special | sign);
}

std::uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

std::uint16_t to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  std::uint32_t half = 0;
  if (magnitude >= 0x47800000U) {  // 65536 and more, Inf, NaN
    half = magnitude > 0x7F800000U ? 0x7E00U : 0x7C00U;
  } else if (magnitude < 0x38800000U) {  // subnormal: adding 0.5 lets the float unit round to 2⁻²⁴
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - std::bit_cast<std::uint32_t>(0.5F);
  } else {
    half = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

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
using Vec [[gnu::vector_size(16), gnu::aligned(4), gnu::may_alias]] = float;
constexpr std::int64_t kVecWidth = 4;
constexpr std::int64_t kMicroVecs = kMicroColumns / kVecWidth;

// c += a · b for `rows` × `depth` times `depth` × `columns`; rows and columns are padded to the micro-tile's size.
void multiply_add(Matrix a, Matrix b, Matrix c, std::int64_t rows, std::int64_t depth, std::int64_t columns) {
  for (std::int64_t column = 0; column < columns; column += kMicroColumns) {
    for (std::int64_t row = 0; row < rows; row += kMicroRows) {
      Vec sums[kMicroRows][kMicroVecs] = {};
      for (std::int64_t k = 0; k < depth; ++k) {
        const auto* b_row = reinterpret_cast<const Vec*>(b.data + k * b.stride + column);
        for (std::int64_t r = 0; r < kMicroRows; ++r) {
          const float a_value = a.data[(row + r) * a.stride + k];
          for (std::int64_t i = 0; i < kMicroVecs; ++i) sums[r][i] += a_value * b_row[i];
        }
      }
      for (std::int64_t r = 0; r < kMicroRows; ++r) {
        auto* c_row = reinterpret_cast<Vec*>(c.data + (row + r) * c.stride + column);
        for (std::int64_t i = 0; i < kMicroVecs; ++i) c_row[i] += sums[r][i];
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
        keys(round_up(problem.seq_kv, kTileKeys)),
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
        rows_(std::min(kBlockRows, problem.seq_q - first)),
        padded_rows_(round_up(rows_, kMicroRows)),
        kv_head_(head / (problem.heads / problem.kv_heads)),
        keys_(row_end(rows_ - 1)),
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
  // Keys that row `row` of the block may see by length and causality.
  [[nodiscard]] std::int64_t row_end(std::int64_t row) const {
    const std::int64_t length = p_.kv_length(batch_);
    return p_.causal ? std::clamp<std::int64_t>(first_ + row + p_.causal_offset + 1, 0, length) : length;
  }

  void load_query() {
    std::fill_n(query_.data, padded_rows_ * query_.stride, 0.F);
    for (std::int64_t row = 0; row < rows_; ++row) {
      const Strides& s = p_.query_strides;
      load_row(p_.query, p_.type, batch_ * s.batch + (first_ + row) * s.token + head_ * s.head, p_.head_size,
               query_.data + row * query_.stride, 1);
    }
  }

  [[nodiscard]] std::int64_t kv_offset(const Strides& s, std::int64_t key) const {
    return batch_ * s.batch + key * s.token + kv_head_ * s.head;
  }

  void compute_logits() {
    for (std::int64_t first = 0; first < keys_; first += kTileKeys) {
      const std::int64_t count = std::min(kTileKeys, keys_ - first);
      if (count < kTileKeys) std::fill_n(tile_, kTileKeys * p_.head_size, 0.F);
      for (std::int64_t key = 0; key < count; ++key) {  // the tile is Kᵀ
        load_row(p_.key, p_.type, kv_offset(p_.key_strides, first + key), p_.head_size, tile_ + key, kTileKeys);
      }
      const Matrix logits{logits_.data + first, logits_.stride};
      for (std::int64_t row = 0; row < padded_rows_; ++row) {
        std::fill_n(logits.data + row * logits.stride, kTileKeys, 0.F);
      }
      for (std::int64_t d = 0; d < p_.head_size; d += kDepth) {
        multiply_add({query_.data + d, query_.stride}, {tile_ + d * kTileKeys, kTileKeys}, logits, padded_rows_,
                     std::min(kDepth, p_.head_size - d), kTileKeys);
      }
    }
  }

  // Calls use(key, value added to the logit) for keys [first, end) of `row`; −∞ hides.
  template <class Use>
  void read_mask(std::int64_t row, std::int64_t first, std::int64_t end, Use use) const {
    const Strides& s = p_.mask_strides;
    const std::int64_t offset = batch_ * s.batch + (first_ + row) * s.token + head_ * s.head;
    const auto read = [&](const auto* mask, auto convert) {
      for (std::int64_t key = first; key < end; ++key) use(key, convert(mask[offset + key * p_.mask_key_stride]));
    };
    switch (p_.mask_type) {
      case ElementType::boolean:
        return read(static_cast<const std::uint8_t*>(p_.mask),
                    [](std::uint8_t seen) { return seen != 0 ? 0.F : -kInfinity; });
      case ElementType::bfloat16:
        return read(static_cast<const std::uint16_t*>(p_.mask), from_bf16);
      case ElementType::float16:
        return read(static_cast<const std::uint16_t*>(p_.mask), from_f16);
      case ElementType::float32:
        return read(static_cast<const float*>(p_.mask), [](float value) { return value; });
    }
  }

  // Scale and mask; what stands in hidden places (NaN too) is overwritten.
  void mask_row(std::int64_t row) {
    float* logits = logits_.data + row * logits_.stride;
    const std::int64_t end = row_end(row);
    for (std::int64_t key = 0; key < end; ++key) logits[key] *= p_.scale;
    if (p_.mask != nullptr) {
      read_mask(row, 0, end, [&](std::int64_t key, float value) {
        logits[key] = value == -kInfinity ? -kInfinity : logits[key] + value;
      });
    }
    std::fill(logits + end, logits + round_up(keys_, kTileKeys), -kInfinity);
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
    for (std::int64_t first = 0; first < keys_; first += kTileKeys) {
      const std::int64_t count = std::min(kTileKeys, keys_ - first);
      std::int64_t odd_keys[kTileKeys];  // those with NaN or Inf in V: hidden ones must not become 0 · NaN
      std::int64_t odd_count = 0;
      for (std::int64_t key = 0; key < count; ++key) {
        float* value = tile_ + key * layout_.depth;
        load_row(p_.value, p_.type, kv_offset(p_.value_strides, first + key), p_.head_size, value, 1);
        std::fill(value + p_.head_size, value + layout_.depth, 0.F);
        if (!std::all_of(value, value + p_.head_size, [](float x) { return std::isfinite(x); })) {
          odd_keys[odd_count++] = first + key;
          std::fill_n(value, p_.head_size, 0.F);
        }
      }
      multiply_add({logits_.data + first, logits_.stride}, {tile_, layout_.depth}, sums_, padded_rows_, count,
                   layout_.depth);
      for (std::int64_t i = 0; i < odd_count; ++i) add_odd_key(odd_keys[i]);
    }
  }

  // P · V of one key for the rows that see it; the tile is free to use.
  void add_odd_key(std::int64_t key) {
    load_row(p_.value, p_.type, kv_offset(p_.value_strides, key), p_.head_size, tile_, 1);
    for (std::int64_t row = 0; row < rows_; ++row) {
      bool seen = key < row_end(row);
      if (seen && p_.mask != nullptr) {
        read_mask(row, key, key + 1, [&](std::int64_t /*key*/, float value) { seen = value != -kInfinity; });
      }
      if (!seen) continue;
      const float probability = logits_.data[row * logits_.stride + key];
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
  const std::int64_t blocks_per_head = (problem.seq_q + kBlockRows - 1) / kBlockRows;
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
