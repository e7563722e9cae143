#pragma once

/// NVFP4, the arithmetic of SAGE_ATTN_3 (SageAttention 3, arXiv 2505.11594), one number after the other: what every
/// kernel's own code, and the tests' reference, has to agree with. Numbers are e2m1 (OCP Microscaling Formats 1.0), 16
/// in a group with a scale of e4m3 (OCP 8-bit Floating Point 1.0), groups under a scale of float32 (NVIDIA,
/// "Pretraining Large Language Models with NVFP4", arXiv 2509.25149). No state; thread-safe; usable at compile time.

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ditattn::kernels {

/// A float of a sign, kExponentBits and kMantissaBits that has no infinities. kMost: its largest number.
template <int kExponentBits, int kMantissaBits, bool kHasNan>
struct SmallFloat {
  static constexpr int kBits = 1 + kExponentBits + kMantissaBits;
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr int kLeastExponent = 1 - kBias;  // of numbers with a leading 1
  static constexpr int kSign = 1 << (kBits - 1);
  static constexpr int kLast = kSign - 1;  // the largest code without a sign: NaN where there is one

  /// 2^exponent.
  static constexpr float power(int exponent) { return std::bit_cast<float>((exponent + 127) << 23); }

  /// What a code stands for.
  static constexpr float decode(unsigned code) {
    const int magnitude = static_cast<int>(code) & kLast;
    const float sign = (code & kSign) != 0 ? -1.F : 1.F;
    if (kHasNan && magnitude == kLast) return std::numeric_limits<float>::quiet_NaN();
    const int exponent = magnitude >> kMantissaBits;
    const int mantissa = magnitude & ((1 << kMantissaBits) - 1);
    if (exponent == 0) return sign * static_cast<float>(mantissa) * power(kLeastExponent - kMantissaBits);
    return sign * static_cast<float>(mantissa + (1 << kMantissaBits)) * power(exponent - kBias - kMantissaBits);
  }
  static constexpr float kMost = decode(kHasNan ? kLast - 1 : kLast);

  /// The nearest number, ties to the one with an even mantissa, `kMost` beyond it; keeps signs, of zero too. NaN stays.
  static constexpr float round(float x) {
    if (x != x) return x;
    const auto sign = std::bit_cast<std::uint32_t>(x) & 0x80000000U;
    const auto size = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) ^ sign);
    if (size >= kMost) return std::bit_cast<float>(std::bit_cast<std::uint32_t>(kMost) | sign);
    const int exponent = static_cast<int>(std::bit_cast<std::uint32_t>(size) >> 23) - 127;
    // What is added moves the last mantissa bit to the sum's last: float32's addition rounds.
    const float move = power((exponent < kLeastExponent ? kLeastExponent : exponent) - kMantissaBits + 23);
    const float rounded = (size + move) - move;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(rounded) | sign);
  }

  /// The code of a number that `round` gives. NaN where there is none: 0.
  static constexpr unsigned encode(float x) {
    if (x != x) return kHasNan ? kLast : 0;
    const auto bits = std::bit_cast<std::uint32_t>(x);
    const unsigned sign = (bits >> 31) != 0 ? kSign : 0;
    const auto size = std::bit_cast<float>(bits & 0x7FFFFFFFU);
    if (size < power(kLeastExponent)) {
      return sign | static_cast<unsigned>(size * power(kMantissaBits - kLeastExponent));
    }
    const auto exponent = static_cast<unsigned>(static_cast<int>((bits & 0x7FFFFFFFU) >> 23) - 127 + kBias);
    const unsigned mantissa = (bits >> (23 - kMantissaBits)) & ((1U << kMantissaBits) - 1);
    return sign | exponent << kMantissaBits | mantissa;
  }
};

using E2m1 = SmallFloat<2, 1, false>;  ///< 0, 0.5, 1, 1.5, 2, 3, 4, 6
using E4m3 = SmallFloat<4, 3, true>;   ///< to 448, in steps of 2⁻⁹ near 0

inline constexpr int kNvfp4Group = 16;

/// The float32 scale of numbers of which the largest is `largest`: it gets the largest group scale there is.
constexpr float nvfp4_scale(float largest) { return largest / (E4m3::kMost * E2m1::kMost); }

/// A group's scale, as e4m3 has it, where the largest of its numbers is `largest`.
constexpr float nvfp4_group_scale(float largest, float scale) {
  return scale == 0 ? 0 : E4m3::round(largest / E2m1::kMost / scale);
}

/// What x becomes: x ≈ number · group scale · scale. 0 where the group's scale is: its numbers are too small beside the
/// largest.
constexpr float nvfp4_number(float x, float group_scale, float scale) {
  return group_scale == 0 ? 0 : E2m1::round(x * (1 / (group_scale * scale)));
}

}  // namespace ditattn::kernels
