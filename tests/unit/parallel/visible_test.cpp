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

TEST(Heads, AreSharedOutOnceWithTheirOwnKeys) {
  for (std::int64_t kv_heads = 1; kv_heads <= 6; ++kv_heads) {
    for (std::int64_t group = 1; group <= 5; ++group) {
      for (std::int64_t parts = 1; parts <= 9; ++parts) {
        std::int64_t next = 0;
        for (std::int64_t part = 0; part < parts; ++part) {
          const Heads heads = heads_of(kv_heads * group, kv_heads, parts, part);
          ASSERT_EQ(heads.query.begin, next);
          ASSERT_LE(heads.runs.size(), 3U);
          ASSERT_LE(heads.query.size(), (kv_heads * group + parts - 1) / parts);
          for (const HeadRun& run : heads.runs) {
            ASSERT_EQ(run.query.begin, next);
            ASSERT_GT(run.query.size(), 0);
            ASSERT_EQ(run.query.size() % run.kv.size(), 0);
            ASSERT_TRUE(run.kv.begin >= heads.kv.begin && run.kv.end <= heads.kv.end);
            const std::int64_t each = run.query.size() / run.kv.size();
            for (std::int64_t i = 0; i < run.query.size(); ++i) {
              ASSERT_EQ((run.query.begin + i) / group, run.kv.begin + i / each) << "another K/V head than alone";
            }
            next = run.query.end;
          }
          ASSERT_EQ(heads.query.end, next);
        }
        ASSERT_EQ(next, kv_heads * group);
      }
    }
  }
}

}  // namespace
}  // namespace ditattn::parallel
