#include "registry/memory_overlap.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <vector>

namespace ditattn {
namespace {

using Sizes = std::vector<std::int64_t>;

class MemoryOverlap : public ::testing::Test {
 protected:
  Tensor view(std::int64_t offset, const Sizes& shape, const Sizes& strides, DLDataType dtype = kFloat32) {
    return wrap(buffer_.data() + offset, shape, dtype, strides);
  }
  std::array<float, 4096> buffer_ = {};
};

TEST_F(MemoryOverlap, ContiguousTensors) {
  const Tensor a = view(0, {2, 3}, {3, 1});
  EXPECT_TRUE(share_memory(a, a));
  EXPECT_TRUE(share_memory(a, view(5, {1}, {1})));
  EXPECT_FALSE(share_memory(a, view(6, {1}, {1})));
  EXPECT_FALSE(share_memory(view(6, {4}, {1}), a));
}

// query, key and value as (B, S, H, D) views of one packed (B, S, 3, H, D) projection, in either order.
TEST_F(MemoryOverlap, InterleavedPackedQkvIsApart) {
  constexpr std::int64_t kTokens = 5;
  constexpr std::int64_t kHeads = 2;
  constexpr std::int64_t kSize = 8;
  const std::int64_t part = kHeads * kSize;
  const auto packed = [&](std::int64_t which) {
    return view(which * part, {2, kTokens, kHeads, kSize}, {kTokens * 3 * part, 3 * part, kSize, 1});
  };
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) EXPECT_EQ(share_memory(packed(i), packed(j)), i == j) << i << " and " << j;
  }
}

TEST_F(MemoryOverlap, HeadsOfOneTensorAreApart) {
  const auto head = [&](std::int64_t h) { return view(h * 4, {6, 4}, {12, 1}); };
  EXPECT_FALSE(share_memory(head(0), head(2)));
  EXPECT_TRUE(share_memory(head(1), view(4, {6, 5}, {12, 1})));
  EXPECT_TRUE(share_memory(head(2), view(4, {6, 5}, {12, 1})));
}

TEST_F(MemoryOverlap, ZeroStrides) {
  const Tensor broadcast = view(10, {7, 4}, {0, 1});
  EXPECT_TRUE(share_memory(broadcast, view(13, {1}, {1})));
  EXPECT_FALSE(share_memory(broadcast, view(14, {1}, {1})));
  EXPECT_TRUE(overlaps_itself(broadcast));
  EXPECT_TRUE(overlaps_itself(view(0, {2}, {0})));
  EXPECT_FALSE(overlaps_itself(view(0, {1, 4}, {0, 1})));  // one element along it: nothing repeats
}

TEST_F(MemoryOverlap, NegativeStrides) {
  const Tensor rows_backwards = view(8, {3, 4}, {-4, 1});  // elements 0 to 11
  EXPECT_TRUE(share_memory(rows_backwards, view(0, {1}, {1})));
  EXPECT_TRUE(share_memory(rows_backwards, view(11, {1}, {1})));
  EXPECT_FALSE(share_memory(rows_backwards, view(12, {1}, {1})));
  const Tensor backwards = view(9, {5}, {-1});  // elements 5 to 9
  EXPECT_TRUE(share_memory(backwards, view(5, {1}, {1})));
  EXPECT_FALSE(share_memory(backwards, view(0, {5}, {1})));
  EXPECT_FALSE(share_memory(backwards, view(10, {5}, {1})));
  EXPECT_FALSE(overlaps_itself(rows_backwards));
  EXPECT_FALSE(overlaps_itself(backwards));
}

TEST_F(MemoryOverlap, EmptyTensorsShareNothing) {
  const Tensor none = view(3, {4, 0, 2}, {2, 2, 1});
  EXPECT_FALSE(share_memory(none, view(0, {16}, {1})));
  EXPECT_FALSE(share_memory(none, none));
  EXPECT_FALSE(overlaps_itself(view(0, {0, 5}, {0, 0})));
}

TEST_F(MemoryOverlap, BytesCountNotElements) {
  const Tensor floats = view(0, {4}, {1});
  const Tensor byte_inside = wrap(reinterpret_cast<char*>(buffer_.data()) + 15, {1}, kBool);
  const Tensor byte_after = wrap(reinterpret_cast<char*>(buffer_.data()) + 16, {1}, kBool);
  EXPECT_TRUE(share_memory(floats, byte_inside));
  EXPECT_FALSE(share_memory(floats, byte_after));
}

TEST_F(MemoryOverlap, TransposedAndPaddedTensorsDoNotOverlapThemselves) {
  EXPECT_FALSE(overlaps_itself(view(0, {3, 4}, {1, 3})));
  EXPECT_FALSE(overlaps_itself(view(0, {3, 4}, {100, 2})));
  EXPECT_TRUE(overlaps_itself(view(0, {3, 4}, {3, 1})));  // rows of 4 every 3
  EXPECT_TRUE(overlaps_itself(view(0, {2, 2}, {1, 1})));
}

// Every element of a view as an index into the buffer.
std::multiset<std::int64_t> elements(std::int64_t offset, const Sizes& shape, const Sizes& strides) {
  std::multiset<std::int64_t> result{offset};
  for (std::size_t i = 0; i < shape.size(); ++i) {
    std::multiset<std::int64_t> next;
    for (std::int64_t at : result) {
      for (std::int64_t k = 0; k < shape[i]; ++k) next.insert(at + k * strides[i]);
    }
    result = next;
  }
  return result;
}

// Against sets of elements: exact where the last dimension is dense, in either direction.
TEST_F(MemoryOverlap, RandomViewsAgreeWithSetsOfElements) {
  constexpr unsigned kSeed = 20260101;
  std::mt19937 random(kSeed);
  const auto from = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  for (int round = 0; round < 3000; ++round) {
    struct View {
      std::int64_t offset;
      Sizes shape;
      Sizes strides;
    };
    std::array<View, 2> views;
    for (View& v : views) {
      v = {from(500, 560), {from(1, 3), from(1, 4), from(1, 5)}, {from(-30, 30), from(-9, 9), from(0, 1) * 2 - 1}};
    }
    const auto a = elements(views[0].offset, views[0].shape, views[0].strides);
    const auto b = elements(views[1].offset, views[1].shape, views[1].strides);
    const bool expected = std::ranges::any_of(a, [&](std::int64_t at) { return b.contains(at); });
    const Tensor tensor_a = view(views[0].offset, views[0].shape, views[0].strides);
    const Tensor tensor_b = view(views[1].offset, views[1].shape, views[1].strides);
    ASSERT_EQ(share_memory(tensor_a, tensor_b), expected) << "round " << round << " of seed " << kSeed;
    const bool repeats = std::set(a.begin(), a.end()).size() < a.size();
    ASSERT_TRUE(!repeats || overlaps_itself(tensor_a)) << "a repeated element went unseen, round " << round;
  }
}

}  // namespace
}  // namespace ditattn
