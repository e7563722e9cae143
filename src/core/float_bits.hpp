#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ditattn {

/// bfloat16 is float32's upper half (Wang and Kanwar, "BFloat16: The secret to high performance on Cloud TPUs").
inline float bf16_to_float(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

/// IEEE 754 binary16 to binary32, exact.
inline float f16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1FU;
  const std::uint32_t fraction = bits & 0x3FFU;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000U | (fraction << 13));
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24F, std::bit_cast<float>(sign));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
}

/// Rounds a float64 to a smaller binary format, nearest even, straight from float64 (no double rounding): `digits` is
/// the significand's width, `min_exponent` the smallest normal exponent, `max` the largest finite value.
inline double round_to_format(double value, int digits, int min_exponent, double max) {
  if (!std::isfinite(value) || value == 0) return value;
  int exponent = 0;
  std::frexp(value, &exponent);
  const int quantum = std::max(exponent - 1, min_exponent) - (digits - 1);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -quantum)), quantum);
  return std::abs(rounded) > max ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

inline std::uint16_t bf16_from_double(double value) {
  const auto rounded = static_cast<float>(round_to_format(value, 8, -126, 0x1.FEp127));
  if (std::isnan(rounded)) return 0x7FC0;
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(rounded) >> 16);
}

/// binary32 to bfloat16, nearest even.
inline std::uint16_t bf16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

/// binary32 to binary16, nearest even. Small results are rounded by an addition whose last place is theirs.
inline std::uint16_t f16_from_float(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  std::uint32_t half = 0;
  if (magnitude > 0x7F800000U) {
    half = 0x7E00;
  } else if (magnitude >= 0x47800000U) {  // 2^16
    half = 0x7C00;
  } else if (magnitude < 0x38800000U) {  // 2^-14
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - std::bit_cast<std::uint32_t>(0.5F);
  } else {
    half = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

inline std::uint16_t f16_from_double(double value) {
  if (std::isnan(value)) return 0x7E00;
  const double rounded = round_to_format(value, 11, -14, 65504);
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  if (std::isinf(rounded)) return sign | 0x7C00;
  const double magnitude = std::abs(rounded);
  if (magnitude < 0x1p-14) return static_cast<std::uint16_t>(sign | static_cast<int>(magnitude * 0x1p24));
  int exponent = 0;
  const double fraction = std::frexp(magnitude, &exponent);  // in [0.5, 1)
  const int bits = static_cast<int>(fraction * 2048) - 1024;
  return static_cast<std::uint16_t>(sign | ((exponent + 14) << 10) | bits);
}

}  // namespace ditattn
