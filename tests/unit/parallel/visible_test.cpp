// Blocks of a problem, cut into calls without causal offsets, show each row exactly the keys it sees.

#include "parallel/visible.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "parallel/heads.hpp"

namespace ditattn::parallel {
namespace {

constexpr auto kTopLeft = CausalAlignment::top_left;
constexpr auto kBottomRight = CausalAlignment::bottom_right;

using Seen = std::map<std::array<std::int64_t, 3>, int>;  // batch, row, key: how many calls show it

// What a back end would compute by its own causal rule.
void show(const BlockCall& call, Range rows, Range keys, CausalAlignment alignment, Seen& seen) {
  const std::int64_t offset = alignment == kBottomRight ? call.keys.size() - call.rows.size() : 0;
  for (std::int64_t b = call.batch.begin; b < call.batch.end; ++b) {
    for (std::int64_t i = 0; i < call.rows.size(); ++i) {
      for (std::int64_t j = 0; j < call.keys.size(); ++j) {
        if (!call.causal || j <= i + offset) {
          ++seen[{b, rows.begin + call.rows.begin + i, keys.begin + call.keys.begin + j}];
        }
      }
    }
  }
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : generator_(seed) {}
  std::int64_t number(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(generator_);
  }

 private:
  std::mt19937_64 generator_;
};

// Cuts both sides at random and holds what all blocks show against `sees`.
template <class Sees>
void expect_exact(Random& random, const RangeRequest& request, const KeyRanges* ranges, const Sees& sees) {
  const auto pieces = visible_pieces(request, ranges);
  const std::int64_t row_cut = random.number(0, request.rows);
  const std::int64_t key_cut = random.number(0, request.keys);
  Seen seen;
  for (const Range rows : {Range{0, row_cut}, Range{row_cut, request.rows}}) {
    for (const Range keys : {Range{0, key_cut}, Range{key_cut, request.keys}}) {
      for (const BlockCall& call : calls_between(pieces, rows, keys, request.alignment)) {
        ASSERT_TRUE(call.rows.size() > 0 && call.keys.size() > 0 && call.batch.size() > 0);
        ASSERT_TRUE(call.rows.end <= rows.size() && call.keys.end <= keys.size());
        show(call, rows, keys, request.alignment, seen);
      }
    }
  }
  for (std::int64_t b = 0; b < request.batch; ++b) {
    for (std::int64_t i = 0; i < request.rows; ++i) {
      for (std::int64_t j = 0; j < request.keys; ++j) {
        const auto found = seen.find({b, i, j});
        ASSERT_EQ(found == seen.end() ? 0 : found->second, sees(b, i, j) ? 1 : 0)
            << fmt::format("batch {}, row {}, key {}; cut at row {}, key {}", b, i, j, row_cut, key_cut);
      }
    }
  }
}

TEST(Visible, CausalBlocksAreExact) {
  for (std::uint64_t seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE(fmt::format("seed {}", seed));
    Random random(seed);
    const RangeRequest request{.batch = 1,
                               .rows = random.number(1, 9),
                               .keys = random.number(0, 9),
                               .causal = seed % 4 != 0,
                               .alignment = seed % 2 == 0 ? kTopLeft : kBottomRight};
    const std::int64_t offset = request.alignment == kBottomRight ? request.keys - request.rows : 0;
    expect_exact(random, request, nullptr, [&](std::int64_t, std::int64_t row, std::int64_t key) {
      return !request.causal || key <= row + offset;
    });
    if (HasFatalFailure()) return;
  }
}

// Ranges as spans and packed sequences make them: by entry or for all, growing or not, empty too.
TEST(Visible, BlocksOfRangesAreExact) {
  for (std::uint64_t seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE(fmt::format("seed {}", seed));
    Random random(seed);
    const RangeRequest request{.batch = random.number(1, 2),
                               .rows = random.number(1, 12),
                               .keys = random.number(1, 12),
                               .causal = false,
                               .alignment = seed % 2 == 0 ? kTopLeft : kBottomRight};
    KeyRanges ranges{.bounds = {}, .batch_stride = seed % 3 == 0 ? 2 * request.rows : 0};
    for (std::int64_t i = 0; i < request.rows * (ranges.batch_stride > 0 ? request.batch : 1); ++i) {
      const auto before = ranges.bounds.size();
      const bool continues = i > 0 && random.number(0, 3) > 0;
      const std::int64_t begin = continues ? ranges.bounds[before - 2] : random.number(0, request.keys);
      const std::int64_t end = continues ? std::min(ranges.bounds[before - 1] + random.number(0, 1), request.keys)
                                         : random.number(begin, request.keys);
      ranges.bounds.insert(ranges.bounds.end(), {begin, end});
    }
    expect_exact(random, request, &ranges, [&](std::int64_t batch, std::int64_t row, std::int64_t key) {
      const auto at = static_cast<std::size_t>(batch * ranges.batch_stride + 2 * row);
      return key >= ranges.bounds[at] && key < ranges.bounds[at + 1];
    });
    if (HasFatalFailure()) return;
  }
}

TEST(Visible, HugeOffsetsDoNotOverflow) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 40;
  const RangeRequest request{.batch = 1, .rows = kHuge, .keys = 2 * kHuge, .causal = true, .alignment = kBottomRight};
  const auto pieces = visible_pieces(request, nullptr);
  const Range rows{kHuge - 8, kHuge};
  EXPECT_EQ(calls_between(pieces, rows, {0, kHuge}, kBottomRight),
            (std::vector<BlockCall>{{.batch = {0, 1}, .rows = {0, 8}, .keys = {0, kHuge}}}));
  EXPECT_EQ(calls_between(pieces, rows, {2 * kHuge - 8, 2 * kHuge}, kBottomRight),
            (std::vector<BlockCall>{{.batch = {0, 1}, .rows = {0, 8}, .keys = {0, 8}, .causal = true}}));
  EXPECT_TRUE(calls_between(pieces, {0, 8}, {kHuge + 8, 2 * kHuge}, kBottomRight).empty()) << "wholly in the future";
}

// A square on the diagonal is one call, as a back end is fastest.
TEST(Visible, ADiagonalBlockIsOneCall) {
  const RangeRequest request{.batch = 3, .rows = 32, .keys = 32, .causal = true, .alignment = kTopLeft};
  for (const auto alignment : {kTopLeft, kBottomRight}) {
    const auto calls = calls_between(visible_pieces(request, nullptr), {8, 16}, {8, 16}, alignment);
    EXPECT_EQ(calls, (std::vector<BlockCall>{{.batch = {0, 3}, .rows = {0, 8}, .keys = {0, 8}, .causal = true}}));
  }
}

// In how many calls, and whether each has the K/V heads that it has alone, come with its part or with one before.
void check_heads(const Heads& heads, std::int64_t group) {
  std::int64_t next = heads.query.begin;
  std::int64_t next_kv = heads.kv.begin;
  std::size_t run = 0;
  for (const HeadPart& part : heads.parts) {
    ASSERT_EQ(part.query.begin, next);
    ASSERT_EQ(part.kv.begin, next_kv) << "sent twice, or never";
    next_kv = part.kv.end;
    const std::size_t first = run;
    for (; run < heads.runs.size() && heads.runs[run].query.begin < part.query.end; ++run) {
      const auto& [query, kv] = heads.runs[run];
      ASSERT_EQ(query.begin, next);
      ASSERT_GT(query.size(), 0);
      ASSERT_EQ(query.size() % kv.size(), 0);
      ASSERT_TRUE(kv.begin >= heads.kv.begin && kv.end <= next_kv);
      ASSERT_TRUE(kv.begin >= part.kv.begin || kv.end <= part.kv.begin) << "of two parts";
      const std::int64_t each = query.size() / kv.size();
      for (std::int64_t i = 0; i < query.size(); ++i) {
        ASSERT_EQ((query.begin + i) / group, kv.begin + i / each) << "another K/V head than alone";
      }
      next = query.end;
    }
    ASSERT_LE(run - first, 3U);
    ASSERT_EQ(part.query.end, next);
  }
  ASSERT_EQ(heads.query.end, next);
  ASSERT_EQ(heads.kv.end, next_kv);
  ASSERT_EQ(run, heads.runs.size());
}

TEST(Heads, AreSharedOutOnceWithTheirOwnKeys) {
  for (std::int64_t kv_heads = 1; kv_heads <= 6; ++kv_heads) {
    for (std::int64_t group = 1; group <= 5; ++group) {
      const std::int64_t all = kv_heads * group;
      for (std::int64_t ranks = 1; ranks <= 9; ++ranks) {
        for (const Cut cut :
             {Cut{}, Cut{.first = 1}, Cut{.last = 2}, Cut{.first = 3, .last = 1}, Cut{.first = 2, .last = 5}}) {
          SCOPED_TRACE(::testing::Message() << all << " heads, " << kv_heads << " of K/V, " << ranks << " ranks, cut "
                                            << cut.first << ", " << cut.last);
          std::int64_t next = 0;
          for (std::int64_t rank = 0; rank < ranks; ++rank) {
            const Heads heads = heads_of(all, kv_heads, ranks, rank, cut);
            ASSERT_EQ(heads.query.begin, next);
            ASSERT_LE(heads.query.size(), (all + ranks - 1) / ranks);
            ASSERT_EQ(heads.parts.size(), static_cast<std::size_t>(cut.parts()));
            ASSERT_NO_FATAL_FAILURE(check_heads(heads, group));
            next = heads.query.end;
          }
          ASSERT_EQ(next, all);
        }
      }
    }
  }
}

// On 132 multiprocessors. 24 tiles of 192 rows, or 36 of 128, are a head of 4,608 rows.
TEST(Heads, AreCutWhereNothingIsLost) {
  const auto cut = [](std::int64_t heads, std::int64_t rows, std::int64_t multiprocessors = 132) {
    return cut_that_pays(heads, 1, rows, multiprocessors);
  };
  EXPECT_EQ(cut(12, 4608), (Cut{.first = 2, .last = 5})) << "a round of 128 rows and two of 192, not three of 192";
  EXPECT_EQ(cut(5, 4608), Cut{}) << "one round";
  EXPECT_EQ(cut(20, 75'600), (Cut{.first = 4, .last = 4})) << "12, 36 and 12 rounds, as 60";
  EXPECT_EQ(cut(6, 32'760), (Cut{.first = 3, .last = 0})) << "4 and 4 rounds, as 8";
  EXPECT_EQ(cut(12, 64), Cut{});
  EXPECT_EQ(cut(1, 1'000'000), Cut{});
  EXPECT_EQ(cut(0, 4608), Cut{});
  EXPECT_EQ(cut(12, 0), Cut{});
  EXPECT_EQ(cut(12, 4608, 0), Cut{}) << "on a CPU";
}

}  // namespace
}  // namespace ditattn::parallel
