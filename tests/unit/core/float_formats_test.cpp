// float16 and bfloat16 against IEEE 754's own formula: value = (−1)^s · 2^(e − bias − digits) · significand. Every bit
// pattern, and between every two neighbours the tie and the float64 values just beside it, so that a conversion that
// goes through float32 (double rounding) is found.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "ditattn/tensor.hpp"

namespace ditattn {
namespace {

struct Format {
  const char* name;
  DLDataType dtype;
  int fraction_bits;
  int bias;
};

class FloatFormat : public ::testing::TestWithParam<Format> {
 protected:
  [[nodiscard]] int fraction_bits() const { return GetParam().fraction_bits; }
  [[nodiscard]] unsigned infinity() const { return 0x7FFFU >> fraction_bits() << fraction_bits(); }

  // What `bits` stand for; where the format would hold NaN or infinity, the finite value its exponent continues with.
  [[nodiscard]] double formula(unsigned bits) const {
    const int exponent = static_cast<int>((bits & 0x7FFFU) >> fraction_bits());
    const unsigned fraction = bits & ((1U << fraction_bits()) - 1);
    const unsigned significand = exponent == 0 ? fraction : fraction | (1U << fraction_bits());
    const double value =
        std::ldexp(static_cast<double>(significand), std::max(exponent, 1) - GetParam().bias - fraction_bits());
    return (bits & 0x8000U) != 0 ? -value : value;
  }
  [[nodiscard]] bool is_nan(unsigned bits) const { return (bits & 0x7FFFU) > infinity(); }

  [[nodiscard]] double load(unsigned bits) const {
    const auto stored = static_cast<std::uint16_t>(bits);
    return load_element(&stored, 0, GetParam().dtype);
  }
  [[nodiscard]] unsigned store(double value) const {
    std::uint16_t stored = 0xABCD;
    store_element(&stored, 0, GetParam().dtype, value);
    return stored;
  }
};

TEST_P(FloatFormat, EveryPatternIsReadAsTheFormulaSays) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const double value = load(bits);
    if (is_nan(bits)) {
      ASSERT_TRUE(std::isnan(value)) << std::hex << bits;
    } else if ((bits & 0x7FFFU) == infinity()) {
      ASSERT_TRUE(std::isinf(value) && std::signbit(value) == (bits >> 15 != 0)) << std::hex << bits;
    } else {
      ASSERT_EQ(value, formula(bits)) << std::hex << bits;
      ASSERT_EQ(std::signbit(value), bits >> 15 != 0) << std::hex << bits;  // −0 too
    }
  }
}

TEST_P(FloatFormat, EveryPatternRoundTrips) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const unsigned again = store(load(bits));
    if (is_nan(bits)) {
      ASSERT_TRUE(is_nan(again)) << std::hex << bits << " became " << again;
    } else {
      ASSERT_EQ(again, bits) << std::hex << bits;
    }
  }
}

// The last step is from the largest finite value to the overflow threshold, half a step above it.
TEST_P(FloatFormat, RoundsToNearestAndTiesToEven) {
  for (unsigned sign : {0U, 0x8000U}) {
    for (unsigned low = 0; low < infinity(); ++low) {
      const unsigned below = sign | low;
      const unsigned above = sign | (low + 1);
      const double tie = (formula(below) + formula(above)) / 2;
      ASSERT_EQ(store(tie), (low & 1) == 0 ? below : above) << std::hex << below;
      ASSERT_EQ(store(std::nextafter(tie, 0)), below) << std::hex << below;
      ASSERT_EQ(store(std::nextafter(tie, 2 * tie)), above) << std::hex << below;
    }
  }
}

TEST_P(FloatFormat, Extremes) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(store(kInfinity), infinity());
  EXPECT_EQ(store(-kInfinity), 0x8000U | infinity());
  EXPECT_EQ(store(std::numeric_limits<double>::max()), infinity());
  EXPECT_EQ(store(std::numeric_limits<double>::lowest()), 0x8000U | infinity());
  EXPECT_EQ(store(std::numeric_limits<double>::denorm_min()), 0U);
  EXPECT_EQ(store(-std::numeric_limits<double>::denorm_min()), 0x8000U);
  EXPECT_TRUE(is_nan(store(std::numeric_limits<double>::quiet_NaN())));
}

INSTANTIATE_TEST_SUITE_P(Formats, FloatFormat,
                         ::testing::Values(Format{"float16", kFloat16, 10, 15}, Format{"bfloat16", kBFloat16, 7, 127}),
                         [](const auto& format) { return std::string(format.param.name); });

}  // namespace
}  // namespace ditattn
