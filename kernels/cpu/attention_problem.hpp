#pragma once

/// What every CPU attention kernel computes, as raw pointers and strides.

#include <cstdint>

namespace ditattn::kernels::cpu {

enum class ElementType : std::uint8_t { float32, float16, bfloat16, boolean };

/// Distances in elements; the head dimension has stride 1.
struct Strides {
  std::int64_t batch = 0;
  std::int64_t token = 0;
  std::int64_t head = 0;
};

/// out = softmax(scale · Q · Kᵀ + mask) · V per (batch, head); query head h reads K/V head h / (heads / kv_heads).
/// Masked means false, −∞, at or past `kv_lengths`, or past the causal diagonal; what stands there never shows.
struct AttentionProblem {
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t seq_q = 0;
  std::int64_t seq_kv = 0;
  std::int64_t head_size = 0;
  ElementType type = ElementType::float32;  ///< of query, key, value and out

  const void* query = nullptr;
  const void* key = nullptr;
  const void* value = nullptr;
  void* out = nullptr;
  Strides query_strides, key_strides, value_strides, out_strides;

  float* lse = nullptr;  ///< natural log-sum-exp of the scaled, masked logits; null: not wanted
  Strides lse_strides;

  float scale = 1;
  bool causal = false;
  std::int64_t causal_offset = 0;  ///< row i sees keys j ≤ i + offset

  const void* mask = nullptr;  ///< null: none. boolean (false hides) or a float type (added to the scaled logits)
  ElementType mask_type = ElementType::boolean;
  Strides mask_strides;  ///< of batch, query row (`token`) and head
  std::int64_t mask_key_stride = 0;

  const std::int64_t* kv_lengths = nullptr;  ///< null: all keys. Else keys seen by batch entry b: [b · stride]
  std::int64_t kv_length_stride = 0;

  /// Keys that batch entry b has at all.
  [[nodiscard]] std::int64_t kv_length(std::int64_t b) const {
    return kv_lengths == nullptr ? seq_kv : kv_lengths[b * kv_length_stride];
  }
};

/// How a kernel spreads work: calls body(context, i) once for each i in [0, count).
struct Executor {
  using Body = void (*)(void* context, std::int64_t index);
  int threads = 1;
  void (*parallel_for)(std::int64_t count, Body body, void* context) = nullptr;
};

}  // namespace ditattn::kernels::cpu
