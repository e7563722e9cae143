#pragma once

/// float16 and bfloat16 from and to float32, one at a time: exact one way, rounded to nearest even the other. Local to
/// each unit that includes it, because units have their own instruction sets.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

[[maybe_unused]] float from_bf16(std::uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
}

// The exponent is rebased by a multiplication, which renormalises subnormals too; Inf and NaN get theirs set.
[[maybe_unused]] float from_f16(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7FFFU;
  const float rebased = __builtin_bit_cast(float, magnitude << 13) * 0x1p112F;
  const std::uint32_t special = magnitude > 0x7BFFU ? 0x7F800000U : 0U;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  return __builtin_bit_cast(float, __builtin_bit_cast(std::uint32_t, rebased) | special | sign);
}

[[maybe_unused]] std::uint16_t to_bf16(float value) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

[[maybe_unused]] std::uint16_t to_f16(float value) {
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  std::uint32_t half = 0;
  if (magnitude >= 0x477FF000U) {  // 65520 and more round to Inf; Inf, NaN
    half = magnitude > 0x7F800000U ? 0x7E00U : 0x7C00U;
  } else if (magnitude < 0x38800000U) {  // subnormal: adding 0.5 lets the float unit round to 2⁻²⁴
    half = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) + 0.5F) - 0x3F000000U;
  } else {
    half = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

}  // namespace
}  // namespace ditattn::kernels::cpu
