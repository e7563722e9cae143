#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "ditattn/metadata.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using Kind = MaskDescription::Kind;
using Lengths = std::vector<std::int64_t>;

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A mask of `shape` with `values` in order (for bool: 0 or 1).
Tensor mask_of(std::initializer_list<std::int64_t> shape, const std::vector<float>& values, DLDataType dtype) {
  Tensor mask = empty(shape, dtype);
  EXPECT_EQ(static_cast<std::size_t>(mask.numel()), values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    store_element(data_pointer(mask), static_cast<std::int64_t>(i), dtype, values[i]);
  }
  return mask;
}

Tensor bools(std::initializer_list<std::int64_t> shape, const std::vector<float>& values) {
  return mask_of(shape, values, kBool);
}

MaskDescription describe(const Tensor& mask) { return AttentionMetadata({.attn_mask = mask})->mask_description(); }

void expect_kind(const Tensor& mask, Kind kind, const Lengths& lengths = {}) {
  const MaskDescription description = describe(mask);
  EXPECT_EQ(description.kind, kind) << "mask of shape " << shape_name(mask);
  EXPECT_EQ(description.kv_lengths, lengths) << "mask of shape " << shape_name(mask);
}

TEST(MaskDescription, WithoutAMaskHidesNothing) {
  EXPECT_EQ(AttentionMetadata(AttentionMetadataFields{})->mask_description().kind, Kind::none);
}

TEST(MaskDescription, AllTrueHidesNothing) {
  expect_kind(bools({3}, {1, 1, 1}), Kind::none);
  expect_kind(bools({2, 3}, {1, 1, 1, 1, 1, 1}), Kind::none);
  expect_kind(bools({1, 2, 3}, {1, 1, 1, 1, 1, 1}), Kind::none);
  expect_kind(bools({1, 1, 1, 1}, {1}), Kind::none);
}

TEST(MaskDescription, AllZeroAdditiveHidesNothing) {
  for (DLDataType dtype : {kFloat32, kFloat16, kBFloat16}) {
    expect_kind(mask_of({1, 1, 2, 2}, {0, -0.F, 0, 0}, dtype), Kind::none);
  }
}

TEST(MaskDescription, PrefixPerBatchEntry) {
  expect_kind(bools({3, 4}, {1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0}), Kind::key_prefix, {2, 4, 0});
  expect_kind(bools({4}, {1, 0, 0, 0}), Kind::key_prefix, {1});
  expect_kind(bools({2, 1, 1, 3}, {1, 0, 0, 1, 1, 0}), Kind::key_prefix, {1, 2});
}

TEST(MaskDescription, PrefixOfAnAdditiveMask) {
  for (DLDataType dtype : {kFloat32, kFloat16, kBFloat16}) {
    expect_kind(mask_of({1, 3}, {0, kHidden, kHidden}, dtype), Kind::key_prefix, {1});
  }
}

TEST(MaskDescription, SameInEveryRowAndHeadIsAPrefix) {
  expect_kind(bools({1, 2, 2, 2}, {1, 0, 1, 0, 1, 0, 1, 0}), Kind::key_prefix, {1});
  expect_kind(bools({2, 2, 2}, {1, 0, 1, 0, 1, 0, 1, 0}), Kind::key_prefix, {1});
}

TEST(MaskDescription, RowsThatDifferAreDense) {
  expect_kind(bools({1, 1, 2, 2}, {1, 0, 1, 1}), Kind::dense);
  expect_kind(bools({1, 2, 2}, {1, 0, 1, 1}), Kind::dense);
}

TEST(MaskDescription, HeadsThatDifferAreDense) {
  expect_kind(bools({1, 2, 1, 2}, {1, 0, 1, 1}), Kind::dense);
  expect_kind(bools({2, 1, 2}, {1, 0, 1, 1}), Kind::dense);  // three dimensions: heads, not batch entries
}

TEST(MaskDescription, HolesAreDense) {
  expect_kind(bools({1, 4}, {1, 0, 1, 0}), Kind::dense);
  expect_kind(bools({1, 4}, {0, 1, 1, 1}), Kind::dense);
  expect_kind(mask_of({1, 3}, {kHidden, 0, 0}, kFloat32), Kind::dense);
}

TEST(MaskDescription, NumbersAreDense) {
  expect_kind(mask_of({1, 2}, {0, -1e9F}, kFloat32), Kind::dense);  // finite: a number, not hidden
  expect_kind(mask_of({1, 2}, {0.5F, kHidden}, kFloat32), Kind::dense);
  expect_kind(mask_of({1, 2}, {0, kNaN}, kFloat32), Kind::dense);
  expect_kind(mask_of({1, 2}, {0, -kHidden}, kFloat32), Kind::dense);  // +inf
}

// One mask key that stands for all keys: "true" means all of them, not one.
TEST(MaskDescription, BroadcastKeyIsNotAPrefixOfOne) {
  expect_kind(bools({2, 1, 1, 1}, {1, 0}), Kind::dense);
  expect_kind(bools({2, 1, 1, 1}, {0, 0}), Kind::key_prefix, {0, 0});
  expect_kind(bools({2, 1}, {1, 0}), Kind::key_prefix, {1, 0});  // (B, Skv) does not broadcast keys: Skv is 1
}

TEST(MaskDescription, BroadcastStridesAreReadOnce) {
  std::array<std::uint8_t, 3> row = {1, 1, 0};
  expect_kind(wrap(row.data(), {2, 8, 4096, 3}, kBool, {0, 0, 0, 1}), Kind::key_prefix, {2, 2});
  std::uint8_t yes = 1;
  expect_kind(wrap(&yes, {2, 4, 5, 6}, kBool, {0, 0, 0, 0}), Kind::none);
  std::uint8_t no = 0;
  expect_kind(wrap(&no, {2, 6}, kBool, {0, 0}), Kind::key_prefix, {0, 0});
}

TEST(MaskDescription, StridedAndReversedMasks) {
  std::array<std::uint8_t, 8> bytes = {1, 9, 1, 9, 0, 9, 0, 9};  // every second byte belongs to the mask
  expect_kind(wrap(bytes.data(), {1, 4}, kBool, {8, 2}), Kind::key_prefix, {2});
  std::array<std::uint8_t, 3> reversed = {0, 1, 1};
  expect_kind(wrap(reversed.data() + 2, {1, 3}, kBool, {3, -1}), Kind::key_prefix, {2});
  std::array<std::uint8_t, 6> transposed = {1, 1, 1, 0, 0, 0};  // (keys, batch) in memory: lengths 2 and 1
  expect_kind(wrap(transposed.data(), {2, 3}, kBool, {1, 2}), Kind::key_prefix, {2, 1});
}

TEST(MaskDescription, AnyNonZeroByteIsTrue) {
  std::array<std::uint8_t, 3> bytes = {2, 255, 0};
  expect_kind(wrap(bytes.data(), {1, 3}, kBool), Kind::key_prefix, {2});
}

TEST(MaskDescription, EmptyMasksAreDense) { expect_kind(empty({0, 4}, kBool), Kind::dense); }

// Reads the mask once: what is written to it afterwards (against the rules) is not seen.
TEST(MaskDescription, IsComputedOnce) {
  const Tensor mask = bools({1, 2}, {1, 0});
  const AttentionMetadata metadata({.attn_mask = mask});
  EXPECT_EQ(metadata->mask_description().kv_lengths, Lengths{1});
  store_element(data_pointer(mask), 1, kBool, 1);
  EXPECT_EQ(metadata->mask_description().kv_lengths, Lengths{1});
}

TEST(MaskDescription, TheHintArbitraryIsTakenAtItsWordAndNoOther) {
  const Tensor mask = bools({1, 3}, {1, 1, 0});
  const auto kind = [&](const char* mode) {
    MetadataExtra extra;
    extra.Set("attention_mask_mode", tvm::ffi::String(mode));
    return AttentionMetadata({.attn_mask = mask, .extra = extra})->mask_description().kind;
  };
  EXPECT_EQ(kind("arbitrary"), MaskDescription::Kind::dense);
  for (const char* mode : {"none", "padding", "Arbitrary", ""}) {
    EXPECT_EQ(kind(mode), MaskDescription::Kind::key_prefix) << mode;
  }
}

TEST(MaskDescription, ManyThreadsAtOnceSeeOneDescription) {
  constexpr int kThreads = 16;
  const AttentionMetadata metadata({.attn_mask = bools({2, 3}, {1, 1, 0, 1, 0, 0})});
  std::array<const MaskDescription*, kThreads> seen = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      seen[t] = &metadata->mask_description();
      EXPECT_EQ(seen[t]->kv_lengths, (Lengths{2, 1}));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const MaskDescription* description : seen) EXPECT_EQ(description, seen[0]);
}

// A padding mask of numbers, as vLLM-Omni's SDPA takes it, would hide nothing here.
TEST(MaskDescription, FloatsOfZeroAndOneAreWarnedAbout) {
  const auto warnings = [](std::initializer_list<std::int64_t> shape, std::initializer_list<double> values) {
    const testing::LogRecorder log;
    Tensor mask = empty(shape, kFloat32);
    std::int64_t i = 0;
    for (const double value : values) store_element(mask.data_ptr(), i++, kFloat32, value);
    const AttentionMetadata metadata({.attn_mask = mask});
    metadata->mask_description();
    metadata->mask_description();
    return log.of(LogLevel::warning);
  };
  EXPECT_EQ(warnings({2, 3}, {1, 1, 0, 1, 0, 0}),
            (std::vector<std::string>{"A mask of shape (2, 3) and dtype float32 holds only 0 and 1: it is added to the "
                                      "logits and hides nothing. Give bool (true = attend) for a padding mask."}));
  EXPECT_TRUE(warnings({2, 3}, {0, 0, 0, 0, 0, 0}).empty());
  EXPECT_TRUE(warnings({2, 3}, {1, 1, 1, 1, 1, 1}).empty());
  EXPECT_TRUE(warnings({2, 3}, {1, 1, 0, 1, 0, -1e9}).empty());
  EXPECT_TRUE(warnings({1, 2, 3}, {1, 1, 0, 1, 0, 0}).empty());
}

}  // namespace
}  // namespace ditattn
