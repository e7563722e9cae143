#pragma once

/// What the launchers of the kernels on matrix units ask of a problem.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/attention_problem.hpp"

namespace ditattn::kernels::cuda {

/// Divides numbers below 2³¹ by a multiplication (Granlund and Montgomery, 1994): a GPU has no instruction for it.
struct Divisor {
  unsigned divisor = 1;
  unsigned multiplier = 1;
  unsigned shift = 0;

  Divisor() = default;
  explicit Divisor(unsigned by) : divisor(by) {
    while ((std::uint64_t{1} << shift) < divisor) ++shift;
    multiplier =
        static_cast<unsigned>(((std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  __host__ __device__ unsigned quotient(unsigned x) const {
    return (static_cast<unsigned>(std::uint64_t{x} * multiplier >> 32) + x) >> shift;
  }
};

/// How blocks of threads find their tiles of query rows.
struct TileOrder {
  unsigned first_tiles = 0;  ///< of the first query segment
  Divisor head_tiles;        ///< of both
  unsigned total_tiles = 0;  ///< of all heads
  Divisor all_heads;         ///< of all batches
  Divisor heads;
  Divisor group;               ///< query heads of a K/V head
  bool longest_first = false;  ///< rows see different numbers of keys
};

constexpr std::int64_t kFlashElementBytes = 2;
constexpr std::int64_t kFlashAlignment = 16;                               // bytes that are read and written at once
constexpr std::int64_t kFlashMostTokens = (std::int64_t{1} << 31) - 1024;  // counted in int32, some beyond the end
constexpr float kFlashLeastScale =
    1e-20F;  // the largest product is taken for the largest logit; masks are divided by it

/// Of a tensor (batch, tokens, heads, head_size).
struct Extents {
  std::int64_t batch;
  std::int64_t tokens;
  std::int64_t heads;
};

inline bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kFlashAlignment == 0; }

/// Distances along axes of one element are never used.
inline bool has_aligned_strides(const Extents& extents, const Strides& strides) {
  const auto is_multiple = [](std::int64_t extent, std::int64_t stride) {
    return extent <= 1 || stride * kFlashElementBytes % kFlashAlignment == 0;
  };
  return is_multiple(extents.batch, strides.batch) && is_multiple(extents.tokens, strides.token) &&
         is_multiple(extents.heads, strides.head);
}

__host__ __device__ inline std::int64_t rows_of(const AttentionProblem& p, int segment) {
  const bool last = segment + 1 == p.num_queries;
  return (last ? p.rows : p.queries[segment + 1].first_row) - p.queries[segment].first_row;
}
inline Extents queries_of(const AttentionProblem& p, int segment) { return {p.batch, rows_of(p, segment), p.heads}; }
inline Extents keys_of(const AttentionProblem& p, int segment) {
  return {p.batch, p.key_segments[segment].keys, p.kv_heads};
}

/// Whether `holds(data, extents, strides)` is true for Q, K and V.
template <class Predicate>
bool all_inputs(const AttentionProblem& p, const Predicate& holds) {
  for (int i = 0; i < p.num_queries; ++i) {
    if (!holds(p.queries[i].data, queries_of(p, i), p.queries[i].strides)) return false;
  }
  for (int i = 0; i < p.num_key_segments; ++i) {
    const KeySegment& segment = p.key_segments[i];
    if (!holds(segment.key, keys_of(p, i), segment.key_strides)) return false;
    if (!holds(segment.value, keys_of(p, i), segment.value_strides)) return false;
  }
  return true;
}

/// Whether rows of the output are pieces that are written at once.
inline bool has_aligned_output(const AttentionProblem& p) {
  return p.head_size * kFlashElementBytes % kFlashAlignment == 0 && is_aligned(p.out) &&
         has_aligned_strides({p.batch, p.rows, p.heads}, p.out_strides);
}

/// Null: tensors that the kernels on matrix units can read and write; else for what they cannot.
inline const char* why_not_flash(const AttentionProblem& p) {
  if (p.type == ElementType::float32) return "float32";
  if (p.head_size > 256) return "a head size above 256";
  if (!(p.scale > kFlashLeastScale)) return "a scale of 1e-20 or less";
  if (std::max({p.batch, p.heads, p.rows, p.keys}) > kFlashMostTokens) return "2^31 rows, keys or heads";
  const auto aligned = [](const void* data, const Extents& extents, const Strides& strides) {
    return extents.tokens == 0 || (is_aligned(data) && has_aligned_strides(extents, strides));
  };
  if (p.head_size % (kFlashAlignment / kFlashElementBytes) != 0 || !all_inputs(p, aligned) ||
      !aligned(p.out, {p.batch, p.rows, p.heads}, p.out_strides)) {
    return "a head size, starts or strides that are not multiples of 16 bytes";
  }
  return nullptr;
}

inline bool has_masks(const AttentionProblem& p) {
  return std::any_of(p.key_segments, p.key_segments + p.num_key_segments,
                     [](const KeySegment& segment) { return segment.mask.data != nullptr; });
}

/// Whether rows may see different keys: only where they do not, blocks are the same whatever rows are in a tile.
inline bool differ_rows(const AttentionProblem& p) { return p.causal || p.ranges != nullptr || has_masks(p); }

inline bool hides_keys(const AttentionProblem& p) {
  return differ_rows(p) || std::any_of(p.key_segments, p.key_segments + p.num_key_segments,
                                       [](const KeySegment& segment) { return segment.lengths != nullptr; });
}

inline std::int64_t divide_up(std::int64_t x, std::int64_t by) { return (x + by - 1) / by; }

inline std::int64_t count_tiles(const AttentionProblem& p, int rows) {
  std::int64_t tiles = 0;
  for (int i = 0; i < p.num_queries; ++i) tiles += divide_up(rows_of(p, i), rows);
  return tiles * p.heads * p.batch;
}

/// For tiles of so many rows. Throws std::runtime_error where they are too many.
inline TileOrder order_tiles(const AttentionProblem& p, int rows) {
  const std::int64_t total = count_tiles(p, rows);
  if (total > kFlashMostTokens) {
    throw std::runtime_error("flash_attention: " + std::to_string(total) + " tiles of " + std::to_string(rows) +
                             " rows; a launch takes at most " + std::to_string(kFlashMostTokens) +
                             ". Split the batch.");
  }
  return {.first_tiles = static_cast<unsigned>(divide_up(rows_of(p, 0), rows)),
          .head_tiles = Divisor(static_cast<unsigned>(total / (p.heads * p.batch))),
          .total_tiles = static_cast<unsigned>(total),
          .all_heads = Divisor(static_cast<unsigned>(p.heads * p.batch)),
          .heads = Divisor(static_cast<unsigned>(p.heads)),
          .group = Divisor(static_cast<unsigned>(p.heads / p.kv_heads)),
          .longest_first = p.causal || p.ranges != nullptr};
}

}  // namespace ditattn::kernels::cuda
