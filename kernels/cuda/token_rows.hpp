#pragma once

/// Rows of tokens as ranks exchange them and put them together: (batch, tokens, heads, head_size) by any strides.

#include <cstdint>
#include <span>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"

namespace ditattn::kernels::cuda {

struct TokenShape {
  std::int64_t batch = 0;
  std::int64_t tokens = 0;
  std::int64_t heads = 0;
  std::int64_t head_size = 0;
};

/// Distances in elements of `element_bytes`: 2 or 4.
struct RowCopy {
  void* to = nullptr;
  const void* from = nullptr;
  Strides to_strides, from_strides;
  TokenShape shape;
  std::int64_t element_bytes = 0;
};
/// All of them, `kRowCopiesAtOnce` a launch.
void copy_rows(std::span<const RowCopy> copies, const Launch& launch);
inline constexpr std::size_t kRowCopiesAtOnce = 32;

/// Results for some keys: numbers, and their log-sum-exp, one per row (`lse_strides`).
struct PartRows {
  void* out = nullptr;
  ElementType type = ElementType::float32;
  Strides out_strides;
  float* lse = nullptr;
  Strides lse_strides;
};
/// Attention over the keys of `a` and `b`; `to` may be `a`. `to` and `a` are in float32 or in `b`'s type. Where one
/// side's LSE is −∞ the other stays as it is, whatever stands there; a NaN in an LSE makes the row NaN.
void merge_rows(const TokenShape& shape, const PartRows& to, const PartRows& a, const PartRows& b,
                const Launch& launch);

/// Zeros and −∞; in float32.
void clear_rows(const TokenShape& shape, const PartRows& whole, const Launch& launch);

/// Rounds float32 rows to `to`'s type, to nearest even.
void round_rows(const TokenShape& shape, const PartRows& to, const PartRows& from, const Launch& launch);

}  // namespace ditattn::kernels::cuda
