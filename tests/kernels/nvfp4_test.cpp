// kernels/nvfp4.hpp against the formats' definitions: every code, every tie and its neighbours, all float16 numbers.
// nvfp4_check.py compares the same with ml_dtypes.

#include "kernels/nvfp4.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "tests/kernels/draw.hpp"
#include "tests/kernels/options.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The numbers of a format that are not negative, in order, from its definition: (m / 2^M) · 2^(1 − bias), then
// (1 + m / 2^M) · 2^(e − bias).
std::vector<double> numbers_of(int exponents, int mantissas, int bias, int count) {
  std::vector<double> numbers;
  for (int e = 0; e < exponents; ++e) {
    for (int m = 0; m < mantissas; ++m) {
      const double fraction = static_cast<double>(m) / mantissas;
      numbers.push_back(e == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, e - bias));
    }
  }
  numbers.resize(static_cast<std::size_t>(count));
  return numbers;
}

// The nearest of `numbers` in double precision; of two as near the one with an even code; the last beyond it.
double nearest(const std::vector<double>& numbers, double x) {
  const double size = std::fmin(std::fabs(x), 2 * numbers.back());
  std::size_t best = 0;
  for (std::size_t i = 1; i < numbers.size(); ++i) {
    const double closer = std::fabs(numbers[best] - size) - std::fabs(numbers[i] - size);
    if (closer > 0 || (closer == 0 && i % 2 == 0)) best = i;
  }
  return std::copysign(numbers[best], x);
}

template <class Format>
void check_format(const char* name, const std::vector<double>& numbers) {
  for (std::size_t code = 0; code < numbers.size(); ++code) {
    const auto number = static_cast<float>(numbers[code]);
    const auto negative = static_cast<unsigned>(code) | Format::kSign;
    EXPECT_EQ(Format::decode(static_cast<unsigned>(code)), number) << name << " code " << code;
    EXPECT_EQ(Format::decode(negative), -number) << name << " code " << negative;
    EXPECT_EQ(Format::encode(number), code) << name << ' ' << number;
    EXPECT_EQ(Format::encode(-number), negative) << name << ' ' << -number;
    EXPECT_EQ(Format::round(number), number);
    EXPECT_EQ(std::signbit(Format::round(-number)), true) << name << ' ' << number;
  }
  EXPECT_EQ(Format::kMost, static_cast<float>(numbers.back()));
  int checked = 0;
  const auto check = [&](float x) {
    for (const float y : {x, -x}) {
      const float rounded = Format::round(y);
      ASSERT_EQ(static_cast<double>(rounded), nearest(numbers, y)) << name << ' ' << y;
      ASSERT_EQ(std::signbit(rounded), std::signbit(y)) << name << ' ' << y;
      ASSERT_EQ(Format::decode(Format::encode(rounded)), rounded) << name << ' ' << y;
      ++checked;
    }
  };
  for (std::size_t i = 0; i + 1 < numbers.size(); ++i) {  // ties, and the floats beside them
    const auto tie = static_cast<float>((numbers[i] + numbers[i + 1]) / 2);
    for (const float x : {std::nextafter(tie, 0.F), tie, std::nextafter(tie, kInfinity)}) check(x);
  }
  for (const float x : {Format::kMost, std::nextafter(Format::kMost, kInfinity), 2 * Format::kMost, 3e38F, kInfinity,
                        std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::min()}) {
    check(x);
  }
  Random random{options().seed};
  for (int i = 0; i < 20000; ++i) {  // any exponent, then numbers of the format's size
    const auto bits = static_cast<std::uint32_t>(random());
    const auto any = std::bit_cast<float>(bits & 0x7FFFFFFFU);
    if (any == any) check(any);
    check(static_cast<float>(real(random, 0, 1.1)) * Format::kMost);
  }
  EXPECT_TRUE(std::isnan(Format::round(std::nanf(""))));
  std::printf("%s: %d numbers rounded as the definition has it\n", name, checked);
}

TEST(Nvfp4, E2m1IsItsDefinition) {
  check_format<E2m1>("e2m1", numbers_of(4, 2, 1, 8));
  const std::vector<double> all{0, 0.5, 1, 1.5, 2, 3, 4, 6};
  EXPECT_EQ(numbers_of(4, 2, 1, 8), all);
}

TEST(Nvfp4, E4m3IsItsDefinition) {
  check_format<E4m3>("e4m3", numbers_of(16, 8, 7, 127));
  EXPECT_EQ(E4m3::kMost, 448.F);
  EXPECT_TRUE(std::isnan(E4m3::decode(0x7F)));
  EXPECT_TRUE(std::isnan(E4m3::decode(0xFF)));
  EXPECT_EQ(E4m3::encode(std::nanf("")), 0x7FU);
}

// A group comes back within half a step of the largest step, e4m3's rounding of its scale included.
TEST(Nvfp4, GroupsComeBack) {
  Random random{options().seed};
  double worst = 0;
  for (int round = 0; round < 2000; ++round) {
    const auto size = static_cast<float>(std::exp2(real(random, -30, 30)));
    float group[kNvfp4Group];
    float largest = 0;
    for (float& x : group) {
      x = size * static_cast<float>(real(random, -1, 1));
      largest = std::fmax(largest, std::fabs(x));
    }
    const float scale = nvfp4_scale(4 * largest);  // of a tensor whose largest number is in another group
    const float group_scale = nvfp4_group_scale(largest, scale);
    ASSERT_EQ(E4m3::round(group_scale), group_scale);
    for (const float x : group) {
      const float number = nvfp4_number(x, group_scale, scale);
      ASSERT_EQ(E2m1::round(number), number);
      worst = std::fmax(worst, std::fabs(number * group_scale * scale - x) / largest);
    }
  }
  std::printf("groups: at most %.3f of their largest number off\n", worst);
  EXPECT_LT(worst, 1 / 6. + 1 / 16.);  // half of e2m1's last step, and what a scale that is rounded down cuts off
}

TEST(Nvfp4, ZerosAndNumbersTooSmallBecomeZeros) {
  EXPECT_EQ(nvfp4_group_scale(0, nvfp4_scale(1)), 0);
  EXPECT_EQ(nvfp4_group_scale(0, nvfp4_scale(0)), 0);
  EXPECT_EQ(nvfp4_number(0, 0, 0), 0);
  const float scale = nvfp4_scale(1);
  EXPECT_EQ(nvfp4_number(1e-7F, nvfp4_group_scale(1e-7F, scale), scale), 0);
  EXPECT_EQ(nvfp4_number(1, nvfp4_group_scale(1, scale), scale), 6);
}

static_assert(E2m1::round(2.5F) == 2 && E2m1::round(3.5F) == 4 && E4m3::round(500) == 448, "usable at compile time");

}  // namespace
}  // namespace ditattn::kernels::cpu::testing
