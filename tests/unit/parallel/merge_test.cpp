// Merging by LSE against the softmax over all keys in float64, and what must not leak from parts without keys.

#include "parallel/merge.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "core/float_bits.hpp"
#include "parallel/tokens.hpp"

namespace ditattn::parallel {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kBatch = 2;
constexpr std::int64_t kTokens = 37;
constexpr std::int64_t kHeads = 3;
constexpr std::int64_t kSize = 5;

using Rows = Part;

Rows make_rows(DLDataType dtype = kFloat32) {
  return {.out = empty({kBatch, kTokens, kHeads, kSize}, dtype), .lse = empty({kBatch, kTokens, kHeads, 1}, kFloat32)};
}

Rows cleared() {
  const Rows rows = make_rows();
  clear(rows);
  return rows;
}

double at(const Tensor& tensor, std::int64_t i) { return load_element(data_pointer(tensor), i, tensor.dtype()); }
void set(const Tensor& tensor, std::int64_t i, double value) {
  store_element(data_pointer(tensor), i, tensor.dtype(), value);
}
void fill(const Rows& rows, double out, double lse) {
  for (std::int64_t i = 0; i < rows.out.numel(); ++i) set(rows.out, i, out);
  for (std::int64_t i = 0; i < rows.lse.numel(); ++i) set(rows.lse, i, lse);
}

// Logits and values of one row's keys; some rows see few of them, or none.
struct Key {
  double logit;
  std::array<double, kSize> value;
};

// Softmax of some keys of one row.
void attend(std::span<const Key> keys, std::array<double, kSize>& out, double& lse) {
  double largest = -kInfinity;
  for (const Key& key : keys) largest = std::max(largest, key.logit);
  out = {};
  lse = largest;
  if (largest == -kInfinity) return;
  double sum = 0;
  for (const Key& key : keys) {
    const double p = std::exp(key.logit - largest);
    sum += p;
    for (std::size_t d = 0; d < kSize; ++d) out[d] += p * key.value[d];
  }
  for (double& value : out) value /= sum;
  lse = largest + std::log(sum);
}

class MergeOf : public ::testing::TestWithParam<DLDataType> {};

TEST_P(MergeOf, RandomPartsIsTheSoftmaxOverAllKeys) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  constexpr std::int64_t kParts = 6;
  constexpr std::int64_t kKeys = 4;  // each
  const Rows whole = cleared();
  std::vector<std::vector<Key>> keys(kBatch * kTokens * kHeads);
  for (auto& row : keys) {
    const double spread = std::exp(3 * normal(generator));
    const double hidden = generator() % 4 == 0 ? 0.9 : 0.3;
    for (std::int64_t i = 0; i < kParts * kKeys; ++i) {
      Key& key = row.emplace_back();
      key.logit = std::bernoulli_distribution(hidden)(generator) ? -kInfinity : spread * normal(generator);
      for (double& value : key.value) value = normal(generator);
    }
  }
  for (std::int64_t p = 0; p < kParts; ++p) {
    const Rows part = make_rows(GetParam());
    for (std::size_t r = 0; r < keys.size(); ++r) {
      std::array<double, kSize> out{};
      double lse = 0;
      attend(std::span(keys[r]).subspan(p * kKeys, kKeys), out, lse);
      const auto row = static_cast<std::int64_t>(r);
      for (std::size_t d = 0; d < kSize; ++d) set(part.out, row * kSize + static_cast<std::int64_t>(d), out[d]);
      set(part.lse, row, lse);
    }
    merge(whole, whole, part);
  }
  double worst = 0;
  double worst_lse = 0;
  double largest = 1;  // LSE: what float32 rounds it by moves weights
  for (std::size_t r = 0; r < keys.size(); ++r) {
    std::array<double, kSize> out{};
    double lse = 0;
    attend(keys[r], out, lse);
    const auto row = static_cast<std::int64_t>(r);
    for (std::size_t d = 0; d < kSize; ++d) {
      worst = std::max(worst, std::abs(at(whole.out, row * kSize + static_cast<std::int64_t>(d)) - out[d]));
    }
    if (lse == -kInfinity) {
      EXPECT_EQ(at(whole.lse, row), lse);
    } else {
      largest = std::max(largest, std::abs(lse));
      worst_lse = std::max(worst_lse, std::abs(at(whole.lse, row) - lse) / std::max(1., std::abs(lse)));
    }
  }
  const double rounding = GetParam() == kFloat32 ? 0x1p-24 : GetParam() == kFloat16 ? 0x1p-11 : 0x1p-8;
  std::cout << fmt::format("seed {}: error {:.1e}, LSE {:.1e}\n", seed, worst, worst_lse);
  EXPECT_LE(worst, 4 * (rounding + kParts * largest * 0x1p-24));  // values of 4 at most
  EXPECT_LE(worst_lse, 0x1p-21);
}

// Without sums in float32 between: the same bits.
TEST_P(MergeOf, TwoPartsAreRoundedOnce) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  const std::array<Rows, 2> parts = {make_rows(GetParam()), make_rows(GetParam())};
  for (const Rows& part : parts) {
    for (std::int64_t row = 0; row < part.lse.numel(); ++row) {
      const bool sees_none = generator() % 5 == 0;
      set(part.lse, row, sees_none ? -kInfinity : 3 * normal(generator));
      for (std::int64_t d = 0; d < kSize; ++d) set(part.out, row * kSize + d, sees_none ? 0 : normal(generator));
    }
  }
  const Rows sums = cleared();
  for (const Rows& part : parts) merge(sums, sums, part);
  const Rows expected = make_rows(GetParam());
  convert(expected.out, sums.out);
  const Rows merged = make_rows(GetParam());
  merge(merged, parts[0], parts[1]);
  merge(parts[0], parts[0], parts[1]);  // where one of them stands
  for (const Rows* result : {&merged, &parts[0]}) {
    for (std::int64_t i = 0; i < merged.out.numel(); ++i) ASSERT_EQ(at(result->out, i), at(expected.out, i)) << i;
    for (std::int64_t i = 0; i < merged.lse.numel(); ++i) ASSERT_EQ(at(result->lse, i), at(sums.lse, i)) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(, MergeOf, ::testing::Values(kFloat32, kFloat16, kBFloat16),
                         [](const auto& instance) { return dtype_name(instance.param); });

TEST(Merge, NothingOfAPartWithoutKeysShows) {
  const Rows whole = cleared();
  const Rows garbage = make_rows();
  fill(garbage, std::numeric_limits<double>::quiet_NaN(), -kInfinity);
  merge(whole, whole, garbage);
  for (std::int64_t i = 0; i < whole.out.numel(); ++i) ASSERT_EQ(at(whole.out, i), 0);
  for (std::int64_t i = 0; i < whole.lse.numel(); ++i) ASSERT_EQ(at(whole.lse, i), -kInfinity);

  const Rows part = make_rows();
  fill(part, 1.25, -7.5);
  merge(whole, whole, part);
  merge(whole, whole, garbage);
  for (std::int64_t i = 0; i < whole.out.numel(); ++i) ASSERT_EQ(at(whole.out, i), 1.25);
  for (std::int64_t i = 0; i < whole.lse.numel(); ++i) ASSERT_EQ(at(whole.lse, i), -7.5);
}

TEST(Merge, LargeLogitsDoNotOverflow) {
  const Rows whole = cleared();
  const Rows part = make_rows();
  for (double lse : {-3e4, 3e4, 2e4, 3e4}) {
    fill(part, lse > 2.5e4 ? 2 : 1, lse);
    merge(whole, whole, part);
  }
  for (std::int64_t i = 0; i < whole.out.numel(); ++i) ASSERT_EQ(at(whole.out, i), 2);
  for (std::int64_t i = 0; i < whole.lse.numel(); ++i) ASSERT_NEAR(at(whole.lse, i), 3e4 + std::log(2), 4e-3);
}

TEST(Merge, AVisibleNanIsTheRows) {
  const Rows whole = cleared();
  const Rows part = make_rows();
  fill(part, 1, 0);
  set(part.lse, 4, std::numeric_limits<double>::quiet_NaN());
  merge(whole, whole, part);
  fill(part, 1, 0);
  merge(whole, whole, part);
  for (std::int64_t i = 0; i < whole.lse.numel(); ++i) {
    ASSERT_EQ(std::isnan(at(whole.lse, i)), i == 4);
    ASSERT_EQ(std::isnan(at(whole.out, i * kSize)), i == 4);
  }
}

// All float16s, what lies halfway between two, and what is beside that.
TEST(Merge, RoundsToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x7C00; ++bits) {
    const float value = f16_to_float(static_cast<std::uint16_t>(bits));
    const float half = bits == 0x7BFF ? 65520.F : (value + f16_to_float(static_cast<std::uint16_t>(bits + 1))) / 2;
    for (float near : {value, std::nextafter(half, 0.F), half, std::nextafter(half, 1e9F)}) {
      ASSERT_EQ(f16_from_float(near), f16_from_double(near)) << near;
      ASSERT_EQ(f16_from_float(-near), f16_from_double(-near)) << near;
      ASSERT_EQ(bf16_from_float(near), bf16_from_double(near)) << near;
    }
  }
  for (float value : {std::numeric_limits<float>::max(), std::numeric_limits<float>::infinity(), NAN, 3e38F, 1e-45F}) {
    EXPECT_EQ(f16_from_float(value), f16_from_double(value)) << value;
    EXPECT_EQ(bf16_from_float(value), bf16_from_double(value)) << value;
  }
}

}  // namespace
}  // namespace ditattn::parallel
