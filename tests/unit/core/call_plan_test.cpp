// What kernels read: segments in joined order, and the part of each mask that belongs to each. Sizes throughout: 3
// image rows, 5 image keys, 2 text rows, 4 text keys; 5 rows and 9 keys joined.

#include <gtest/gtest.h>

#include <vector>

#include "ditattn/backend.hpp"
#include "tests/unit/packed_metadata.hpp"

namespace ditattn {
namespace {

using Strides = std::array<std::int64_t, 4>;
using Lengths = std::vector<std::int64_t>;

constexpr CausalAlignment kBottomRight = CausalAlignment::bottom_right;
constexpr CausalAlignment kTopLeft = CausalAlignment::top_left;

// A call with text of its own where `strategy` is given. The plan points into `metadata`.
struct Call {
  Tensor query = empty({2, 3, 2, 4}, kFloat32);
  Tensor key = empty({2, 5, 2, 4}, kFloat32);
  Tensor value = empty({2, 5, 2, 4}, kFloat32);
  Tensor joint_query = empty({2, 2, 2, 4}, kFloat32);
  Tensor joint_key = empty({2, 4, 2, 4}, kFloat32);
  Tensor joint_value = empty({2, 4, 2, 4}, kFloat32);
  Tensor out = {};
  Tensor lse = {};
  AttentionMetadata metadata;
  CallPlan plan;

  explicit Call(AttentionMetadataFields fields, const char* strategy = nullptr, bool causal = false,
                CausalAlignment alignment = kBottomRight)
      : metadata(complete(std::move(fields), strategy)),
        plan(AttentionCall{query, key, value, out, lse, metadata}.plan(causal, alignment)) {}

  AttentionMetadata complete(AttentionMetadataFields fields, const char* strategy) const {
    if (strategy == nullptr) return AttentionMetadata(std::move(fields));
    fields.joint_query = joint_query;
    fields.joint_key = joint_key;
    fields.joint_value = joint_value;
    fields.joint_strategy = strategy;
    return AttentionMetadata(std::move(fields));
  }
  [[nodiscard]] const KeySegment& image() const { return plan.keys[plan.keys[0].key.same_as(key) ? 0 : 1]; }
  [[nodiscard]] const KeySegment& text() const { return plan.keys[plan.keys[0].key.same_as(key) ? 1 : 0]; }
};

// Every third element hides: no prefix.
Tensor dense(std::initializer_list<std::int64_t> shape, DLDataType dtype = kBool) {
  Tensor mask = empty(shape, dtype);
  for (std::int64_t i = 0; i < mask.numel(); ++i) store_element(data_pointer(mask), i, dtype, i % 3 != 0);
  return mask;
}

// The first `length` keys of every row.
Tensor prefix(std::initializer_list<std::int64_t> shape, std::int64_t length) {
  Tensor mask = empty(shape, kBool);
  for (std::int64_t i = 0; i < mask.numel(); ++i) {
    store_element(data_pointer(mask), i, kBool, i % mask.size(-1) < length);
  }
  return mask;
}

void expect_unmasked(const KeySegment& segment) {
  EXPECT_EQ(segment.prefix, nullptr);
  EXPECT_EQ(segment.mask.data, nullptr);
}

void expect_lengths(const KeySegment& segment, const Lengths& lengths, std::int64_t offset) {
  ASSERT_NE(segment.prefix, nullptr);
  EXPECT_EQ(segment.prefix->kv_lengths, lengths);
  EXPECT_EQ(segment.length_offset, offset);
  EXPECT_EQ(segment.mask.data, nullptr) << "a prefix is not read as a mask too";
}

// `first`: the element of the mask that is the segment's first.
void expect_view(const KeySegment& segment, const Tensor& mask, std::int64_t first, const Strides& strides,
                 std::int64_t first_row, std::int64_t rows) {
  EXPECT_EQ(segment.prefix, nullptr);
  const auto* data = static_cast<const char*>(data_pointer(mask)) + first * mask.dtype().bits / 8;
  EXPECT_EQ(segment.mask.data, static_cast<const void*>(data));
  EXPECT_EQ(segment.mask.dtype, mask.dtype());
  EXPECT_EQ(segment.mask.strides, strides);
  EXPECT_EQ(segment.mask.first_row, first_row);
  EXPECT_EQ(segment.mask.rows, rows);
}

// --- Segments

TEST(CallPlan, WithoutMetadata) {
  const Tensor query = empty({2, 3, 2, 4}, kFloat32);
  const Tensor key = empty({2, 5, 2, 4}, kFloat32);
  const Tensor value = empty({2, 5, 2, 4}, kFloat32);
  const CallPlan plan = AttentionCall{query, key, value, {}, {}, {}}.plan(false, kBottomRight);
  EXPECT_EQ(plan.num_queries, 1);
  EXPECT_EQ(plan.num_keys, 1);
  EXPECT_TRUE(plan.queries[0].tensor.same_as(query));
  EXPECT_TRUE(plan.keys[0].key.same_as(key));
  EXPECT_TRUE(plan.keys[0].value.same_as(value));
  EXPECT_EQ(plan.keys[0].keys, 5);
  EXPECT_EQ(plan.total_rows, 3);
  EXPECT_EQ(plan.total_keys, 5);
  EXPECT_FALSE(plan.causal);
  EXPECT_EQ(plan.ranges, nullptr);
  expect_unmasked(plan.keys[0]);
}

TEST(CallPlan, TextInFront) {
  const Call call({}, "front");
  const CallPlan& plan = call.plan;
  ASSERT_EQ(plan.num_queries, 2);
  ASSERT_EQ(plan.num_keys, 2);
  EXPECT_TRUE(plan.queries[0].tensor.same_as(call.joint_query));
  EXPECT_TRUE(plan.queries[1].tensor.same_as(call.query));
  EXPECT_EQ(plan.queries[0].first_row, 0);
  EXPECT_EQ(plan.queries[1].first_row, 2);
  EXPECT_TRUE(plan.keys[0].key.same_as(call.joint_key));
  EXPECT_TRUE(plan.keys[0].value.same_as(call.joint_value));
  EXPECT_TRUE(plan.keys[1].key.same_as(call.key));
  EXPECT_TRUE(plan.keys[1].value.same_as(call.value));
  EXPECT_EQ(plan.keys[0].first_key, 0);
  EXPECT_EQ(plan.keys[0].keys, 4);
  EXPECT_EQ(plan.keys[1].first_key, 4);
  EXPECT_EQ(plan.keys[1].keys, 5);
  EXPECT_EQ(plan.total_rows, 5);
  EXPECT_EQ(plan.total_keys, 9);
}

TEST(CallPlan, TextInTheRear) {
  const Call call({}, "rear");
  const CallPlan& plan = call.plan;
  ASSERT_EQ(plan.num_queries, 2);
  ASSERT_EQ(plan.num_keys, 2);
  EXPECT_TRUE(plan.queries[0].tensor.same_as(call.query));
  EXPECT_TRUE(plan.queries[1].tensor.same_as(call.joint_query));
  EXPECT_EQ(plan.queries[1].first_row, 3);
  EXPECT_TRUE(plan.keys[0].key.same_as(call.key));
  EXPECT_TRUE(plan.keys[1].key.same_as(call.joint_key));
  EXPECT_TRUE(plan.keys[1].value.same_as(call.joint_value));
  EXPECT_EQ(plan.keys[1].first_key, 5);
  EXPECT_EQ(plan.total_rows, 5);
  EXPECT_EQ(plan.total_keys, 9);
}

TEST(CallPlan, ValidPrefix) {
  const MetadataExtra extra = testing::with({}, "valid_kv_length", 3);
  const Call alone({.extra = extra});
  EXPECT_EQ(alone.plan.keys[0].keys, 3);
  EXPECT_EQ(alone.plan.total_keys, 3);
  const Call front({.extra = extra}, "front");
  EXPECT_EQ(front.image().keys, 3);
  EXPECT_EQ(front.image().first_key, 4);
  EXPECT_EQ(front.plan.total_keys, 7);
  const Call rear({.extra = extra}, "rear");
  EXPECT_EQ(rear.image().keys, 3);
  EXPECT_EQ(rear.text().first_key, 3) << "text follows the valid keys";
  EXPECT_EQ(rear.plan.total_keys, 7);
}

TEST(CallPlan, CausalOffset) {
  const MetadataExtra two = testing::with({}, "valid_kv_length", 2);
  EXPECT_EQ(Call({}, nullptr, true, kBottomRight).plan.causal_offset, 5 - 3);
  EXPECT_EQ(Call({}, nullptr, true, kTopLeft).plan.causal_offset, 0);
  EXPECT_EQ(Call({}, "rear", true, kBottomRight).plan.causal_offset, 9 - 5);
  EXPECT_EQ(Call({}, "front", true, kTopLeft).plan.causal_offset, 0);
  EXPECT_EQ(Call({.extra = two}, nullptr, true, kBottomRight).plan.causal_offset, 2 - 3);
  EXPECT_EQ(Call({.extra = two}, "front", true, kBottomRight).plan.causal_offset, 6 - 5);
  EXPECT_TRUE(Call({}, "front", true).plan.causal);
  EXPECT_FALSE(Call({}, "front", false).plan.causal);
}

TEST(CallPlan, RangesTakeCausalityOver) {
  const std::vector<std::vector<Span>> spans = {{{1, 6}}};
  const Call call({.full_attn_spans = spans}, "front", true, kTopLeft);
  EXPECT_FALSE(call.plan.causal);
  ASSERT_NE(call.plan.ranges, nullptr);
  EXPECT_EQ(call.plan.ranges->bounds, (Lengths{0, 1, 0, 6, 0, 6, 0, 6, 0, 6})) << "five joined rows";
  const RangeRequest request{.batch = 2, .rows = 5, .keys = 9, .causal = true, .alignment = kTopLeft};
  EXPECT_EQ(call.metadata->key_ranges(request), call.plan.ranges) << "of the joined sizes, and kept";
}

// --- Masks

TEST(CallPlan, MaskThatHidesNothingIsNotRead) {
  expect_unmasked(Call({.attn_mask = prefix({2, 5}, 5)}).plan.keys[0]);
  const Call joined({.attn_mask = prefix({2, 9}, 9)}, "front");
  expect_unmasked(joined.image());
  expect_unmasked(joined.text());
}

TEST(CallPlan, MaskRanks) {
  const auto expect = [](std::initializer_list<std::int64_t> shape, const Strides& strides) {
    const Tensor mask = dense(shape);
    expect_view(Call({.attn_mask = mask}).plan.keys[0], mask, 0, strides, 0, 3);
  };
  expect({5}, {0, 0, 0, 1});
  expect({2, 5}, {5, 0, 0, 1});
  expect({2, 3, 5}, {0, 15, 5, 1});
  expect({1, 3, 5}, {0, 0, 5, 1});
  expect({2, 2, 3, 5}, {30, 15, 5, 1});
  expect({2, 1, 1, 5}, {5, 0, 0, 1});
  expect({2, 2, 3, 1}, {6, 3, 1, 0});
}

TEST(CallPlan, ImageMaskLeavesTheTextAlone) {
  for (const char* strategy : {"front", "rear"}) {
    const Call padding({.attn_mask = prefix({2, 5}, 2)}, strategy);
    expect_lengths(padding.image(), {2, 2}, 0);
    expect_unmasked(padding.text());
    const Tensor mask = dense({1, 1, 5, 5});
    const Call call({.attn_mask = mask}, strategy);
    expect_view(call.image(), mask, 0, {0, 0, 5, 1}, 0, 5);
    expect_unmasked(call.text());
  }
}

TEST(CallPlan, PrefixOverTheJoinedKeys) {
  const Call front({.attn_mask = prefix({1, 9}, 6)}, "front");
  expect_lengths(front.text(), {6}, 0);
  expect_lengths(front.image(), {6}, 4);
  const Call rear({.attn_mask = prefix({1, 9}, 6)}, "rear");
  expect_lengths(rear.image(), {6}, 0);
  expect_lengths(rear.text(), {6}, 5);
}

TEST(CallPlan, DenseMaskOverTheJoinedKeys) {
  for (DLDataType dtype : {kBool, kBFloat16, kFloat32}) {
    const Tensor mask = dense({2, 1, 5, 9}, dtype);
    const Call front({.attn_mask = mask}, "front");
    expect_view(front.text(), mask, 0, {45, 0, 9, 1}, 0, 5);
    expect_view(front.image(), mask, 4, {45, 0, 9, 1}, 0, 5);
    const Call rear({.attn_mask = mask}, "rear");
    expect_view(rear.image(), mask, 0, {45, 0, 9, 1}, 0, 5);
    expect_view(rear.text(), mask, 5, {45, 0, 9, 1}, 0, 5);
  }
}

// A mask covers all keys, valid or not: the text's columns stay where they are.
TEST(CallPlan, JoinedMaskBesideAValidPrefix) {
  const Tensor mask = dense({1, 1, 5, 9});
  const Call rear({.attn_mask = mask, .extra = testing::with({}, "valid_kv_length", 3)}, "rear");
  EXPECT_EQ(rear.image().keys, 3);
  expect_view(rear.image(), mask, 0, {0, 0, 9, 1}, 0, 5);
  EXPECT_EQ(rear.text().first_key, 3);
  expect_view(rear.text(), mask, 5, {0, 0, 9, 1}, 0, 5);
}

TEST(CallPlan, MaskOfTheImagesRowsOnly) {
  const Tensor mask = dense({1, 2, 3, 5});
  const Call front({.attn_mask = mask}, "front");
  expect_view(front.image(), mask, 0, {0, 15, 5, 1}, 2, 3);
  expect_unmasked(front.text());
  const Call rear({.attn_mask = mask}, "rear");
  expect_view(rear.image(), mask, 0, {0, 15, 5, 1}, 0, 3);
  const Tensor joined = dense({1, 1, 3, 9});
  const Call both({.attn_mask = joined}, "front");
  expect_view(both.text(), joined, 0, {0, 0, 9, 1}, 2, 3);
  expect_view(both.image(), joined, 4, {0, 0, 9, 1}, 2, 3);
}

// Lengths would hide keys from the text's rows as well.
TEST(CallPlan, PrefixOfTheImagesRowsOnlyIsNotLengths) {
  const Tensor mask = prefix({1, 1, 3, 5}, 2);
  ASSERT_EQ(AttentionMetadata({.attn_mask = mask})->mask_description().kind, MaskDescription::Kind::key_prefix);
  expect_view(Call({.attn_mask = mask}, "front").image(), mask, 0, {0, 0, 5, 1}, 2, 3);
  expect_lengths(Call({.attn_mask = prefix({1, 1, 1, 5}, 2)}, "front").image(), {2}, 0);
  expect_lengths(Call({.attn_mask = mask}).image(), {2}, 0);
}

TEST(CallPlan, JointMask) {
  for (const char* strategy : {"front", "rear"}) {
    const Call padding({.joint_attn_mask = prefix({2, 4}, 3)}, strategy);
    expect_lengths(padding.text(), {3, 3}, 0);
    expect_unmasked(padding.image());
    const Tensor image_mask = dense({1, 1, 3, 5});
    const Tensor text_mask = dense({2, 1, 5, 4}, kFloat32);
    const Call both({.attn_mask = image_mask, .joint_attn_mask = text_mask}, strategy);
    expect_view(both.image(), image_mask, 0, {0, 0, 5, 1}, both.plan.queries[1].first_row == 2 ? 2 : 0, 3);
    expect_view(both.text(), text_mask, 0, {20, 0, 4, 1}, 0, 5);
  }
}

}  // namespace
}  // namespace ditattn
