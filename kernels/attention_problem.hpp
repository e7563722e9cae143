#pragma once

/// What every attention kernel computes, as raw pointers and strides, in host or in device memory.

#include <cstdint>

namespace ditattn::kernels {

enum class ElementType : std::uint8_t { float32, float16, bfloat16, boolean };

namespace {

/// Local to each unit that includes it, because units have their own instruction sets.
[[maybe_unused]] constexpr std::int64_t element_bytes(ElementType type) {
  return type == ElementType::float32 ? 4 : type == ElementType::boolean ? 1 : 2;
}

}  // namespace

/// Distances in elements; the head dimension has stride 1.
struct Strides {
  std::int64_t batch = 0;
  std::int64_t token = 0;
  std::int64_t head = 0;
};

/// A mask's element (batch, head, row − first_row, key); rows outside [first_row, first_row + rows) see everything.
struct Mask {
  const void* data = nullptr;               ///< null: none
  ElementType type = ElementType::boolean;  ///< boolean (false hides), or a float type (added to the scaled logits)
  Strides strides;                          ///< `token` is the query row's
  std::int64_t key_stride = 0;
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
};

/// Query rows [first_row, first_row of the next segment).
struct QuerySegment {
  const void* data = nullptr;
  Strides strides;
  std::int64_t first_row = 0;
};

/// Keys [first_key, first_key + keys).
struct KeySegment {
  const void* key = nullptr;
  const void* value = nullptr;
  Strides key_strides, value_strides;
  std::int64_t first_key = 0;
  std::int64_t keys = 0;
  /// Null: all. Else batch entry b sees the first [b · length_stride] − length_offset, bounded to [0, keys].
  const std::int64_t* lengths = nullptr;
  std::int64_t length_stride = 0;
  std::int64_t length_offset = 0;
  Mask mask;
};

/// out = softmax(scale · Q · Kᵀ + mask) · V per (batch, head); query head h reads K/V head h / (heads / kv_heads).
/// The rows of Q and the keys lie in one or two tensors each (text and image), read in place. Masked means false, −∞,
/// past a length, outside the row's range, or past the causal diagonal; what stands there never shows.
struct AttentionProblem {
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t rows = 0;  ///< of all query segments
  std::int64_t keys = 0;  ///< of all key segments
  std::int64_t head_size = 0;
  ElementType type = ElementType::float32;      ///< of query, key and value
  ElementType out_type = ElementType::float32;  ///< `type`, or float32
  float scale = 1;
  bool smooth_key = true;  ///< quantized kernels: take K's channel means off before it is quantized

  QuerySegment queries[2];
  int num_queries = 0;
  KeySegment key_segments[2];
  int num_key_segments = 0;

  void* out = nullptr;  ///< all rows in order
  Strides out_strides;
  float* lse = nullptr;  ///< natural log-sum-exp of the scaled, masked logits; null: not wanted
  Strides lse_strides;

  bool causal = false;
  std::int64_t causal_offset = 0;  ///< row i sees keys j ≤ i + offset
  /// Null: all. Else batch entry b's row r sees keys [ranges[i], ranges[i + 1]), i = b · range_batch_stride + 2 · r.
  /// Ranges have the diagonal in them: `causal` is not looked at.
  const std::int64_t* ranges = nullptr;
  std::int64_t range_batch_stride = 0;
  /// sage3_attention's channel means, as it lays them out.
  const float* means = nullptr;
  /// Quantized kernels: batch entry b has no row that sees keys outside [seen[2 · b], seen[2 · b + 1]). Null: not
  /// known.
  const std::int64_t* seen = nullptr;
};

}  // namespace ditattn::kernels
