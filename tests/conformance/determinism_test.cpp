// Results of our tiled kernels are bit-identical from run to run, and whatever the number of threads, the rest of the
// batch, the other query rows, their masks, and what stands in hidden positions. In SAGE_ATTN_3 all rows of a head
// share Q's mean, unless that is turned off.

#include <ditattn/ditattn.hpp>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string_view>

namespace ditattn {
namespace {

constexpr std::int64_t kBatch = 3;
constexpr std::int64_t kRows = 333;
constexpr std::int64_t kKeys = 517;
constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kSize = 72;

Tensor random_tensor(std::initializer_list<std::int64_t> shape, std::uint64_t seed, DLDataType dtype = kFloat32) {
  Tensor tensor = empty(shape, dtype);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, dtype, normal(generator));
  return tensor;
}

// Rows [first, first + count) of batch entry `entry`, in place.
Tensor slice(const Tensor& tensor, std::int64_t entry, std::int64_t first, std::int64_t count) {
  auto* data = static_cast<float*>(tensor.data_ptr()) + entry * tensor.stride(0) + first * tensor.stride(1);
  return wrap(data, {1, count, tensor.size(2), tensor.size(3)}, kFloat32,
              {tensor.stride(0), tensor.stride(1), tensor.stride(2), 1});
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.numel() == b.numel() &&
         std::memcmp(a.data_ptr(), b.data_ptr(), static_cast<std::size_t>(a.numel()) * sizeof(float)) == 0;
}

class Determinism : public testing::TestWithParam<const char*> {
 protected:
  Tensor query = random_tensor({kBatch, kRows, kHeads, kSize}, 1);
  Tensor key = random_tensor({kBatch, kKeys, kHeads / 2, kSize}, 2);
  Tensor value = random_tensor({kBatch, kKeys, kHeads / 2, kSize}, 3);
  std::unique_ptr<AttentionImpl> attention = make({});
  Tensor whole = attention->forward(query, key, value);

  static std::unique_ptr<AttentionImpl> make(const BackendKwargs& kwargs) {
    return DiffusionAttentionBackendEnum::from_name(GetParam())
        .get_class()
        ->make({.num_heads = kHeads, .head_size = kSize, .num_kv_heads = kHeads / 2, .backend_kwargs = kwargs});
  }
  void TearDown() override { set_num_threads(0); }
};

TEST_P(Determinism, FromRunToRunAndForAnyThreadCount) {
  for (const int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    EXPECT_TRUE(same_bits(attention->forward(query, key, value), whole)) << threads << " threads";
  }
}

TEST_P(Determinism, ForAnyBatch) {
  for (std::int64_t entry = 0; entry < kBatch; ++entry) {
    const Tensor alone =
        attention->forward(slice(query, entry, 0, kRows), slice(key, entry, 0, kKeys), slice(value, entry, 0, kKeys));
    EXPECT_TRUE(same_bits(alone, slice(whole, entry, 0, kRows))) << "batch entry " << entry;
  }
}

TEST_P(Determinism, ForAnyOtherRows) {
  if (std::string_view(GetParam()) == "SAGE_ATTN_3") {
    attention = make({{"smooth_q", false}});
    whole = attention->forward(query, key, value);
  }
  for (const std::int64_t first : {0, 1, 100, 332}) {
    const std::int64_t count = std::min<std::int64_t>(57, kRows - first);
    const Tensor part =
        attention->forward(slice(query, 1, first, count), slice(key, 1, 0, kKeys), slice(value, 1, 0, kKeys));
    EXPECT_TRUE(same_bits(part, slice(whole, 1, first, count))) << "rows from " << first;
  }
}

INSTANTIATE_TEST_SUITE_P(Members, Determinism, testing::Values("FLASH_ATTN", "SAGE_ATTN", "SAGE_ATTN_3"),
                         [](const auto& test) { return std::string(test.param); });

// Causal attention over kTokens tokens, all elements of out and LSE as bytes, by token.
class DeterminismOfRows : public testing::TestWithParam<DLDataType> {
 protected:
  static constexpr std::int64_t kTokens = 900;
  static constexpr std::int64_t kHeadSize = 80;

  struct Result {
    Tensor out;
    Tensor lse;
    [[nodiscard]] std::string row(std::int64_t token) const {
      const std::int64_t bytes = kHeads * kHeadSize * out.dtype().bits / 8;
      std::string text(static_cast<const char*>(out.data_ptr()) + token * bytes, static_cast<std::size_t>(bytes));
      for (std::int64_t head = 0; head < kHeads; ++head) {
        text.append(static_cast<const char*>(lse.data_ptr()) + (head * out.size(1) + token) * 4, 4);
      }
      return text;
    }
  };

  [[nodiscard]] Result run(const Tensor& q, const Tensor& v, bool causal,
                           const AttentionMetadata& metadata = {}) const {
    Result result{.out = empty({1, q.size(1), kHeads, kHeadSize}, q.dtype()),
                  .lse = empty({1, kHeads, q.size(1)}, kFloat32)};
    const BackendClass backend = DiffusionAttentionBackendEnum::FLASH_ATTN.get_class();
    const auto attention = backend->make({.num_heads = kHeads, .head_size = kHeadSize, .causal = causal});
    attention->forward(q, key, v, metadata, {.out = result.out, .lse = result.lse});
    return result;
  }
  static std::int64_t different_rows(const Result& a, const Result& b, std::int64_t rows) {
    std::int64_t count = 0;
    for (std::int64_t token = 0; token < rows; ++token) count += a.row(token) != b.row(token);
    return count;
  }
  void TearDown() override { set_num_threads(0); }

  Tensor query = random_tensor({1, kTokens, kHeads, kHeadSize}, 4, GetParam());
  Tensor key = random_tensor({1, kTokens, kHeads, kHeadSize}, 5, GetParam());
  Tensor value = random_tensor({1, kTokens, kHeads, kHeadSize}, 6, GetParam());
};

TEST_P(DeterminismOfRows, CausalForAnyThreadCount) {
  set_num_threads(1);
  const Result whole = run(query, value, true);
  set_num_threads(64);  // smaller tiles
  EXPECT_EQ(different_rows(run(query, value, true), whole, kTokens), 0);
}

// Differences in the order of a sum rarely survive the rounding of a bfloat16 output: hence many values.
TEST_P(DeterminismOfRows, WhateverStandsInHiddenPositions) {
  constexpr std::int64_t kBad = 880;
  std::int64_t different = 0;
  for (std::uint64_t seed = 100; seed < 124; ++seed) {
    const Tensor finite = random_tensor({1, kTokens, kHeads, kHeadSize}, seed, GetParam());
    const Tensor with_nan = random_tensor({1, kTokens, kHeads, kHeadSize}, seed, GetParam());
    for (std::int64_t i = 0; i < kHeads * kHeadSize; ++i) {
      store_element(with_nan.data_ptr(), kBad * kHeads * kHeadSize + i, GetParam(), std::nan(""));
    }
    set_num_threads(seed % 2 == 0 ? 1 : 64);
    different += different_rows(run(query, with_nan, true), run(query, finite, true), kBad);
  }
  EXPECT_EQ(different, 0);
}

// The first half of the rows has a mask of zeros, the others add something: which the first must not notice.
TEST_P(DeterminismOfRows, WhateverTheMaskDoesToOthers) {
  const Tensor mask = empty({1, 1, kTokens, kTokens}, kFloat32);
  constexpr std::int64_t kUntouched = 417;
  for (std::int64_t i = 0; i < mask.numel(); ++i) {
    const bool touched = i / kTokens >= kUntouched;
    store_element(mask.data_ptr(), i, kFloat32, touched ? static_cast<double>(i % 7) - 3 : 0);
  }
  const Result masked = run(query, value, false, AttentionMetadata({.attn_mask = mask}));
  EXPECT_EQ(different_rows(masked, run(query, value, false), kUntouched), 0);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, DeterminismOfRows, testing::Values(kFloat32, kFloat16, kBFloat16),
                         [](const auto& test) { return dtype_name(test.param); });

}  // namespace
}  // namespace ditattn
