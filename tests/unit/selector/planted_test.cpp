// Bad back ends, planted among good ones: after tuning, none is ever chosen where there is another.

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/unit/selector/planted_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::kSmall;
using testing::Plant;

struct Bad {
  const char* name;
  Plant plant;
  bool is_wrong;  // numbers, which makes it suspect for other problems too
};

std::vector<Bad> bad_ones() {
  return {{"WrongByATenth", {.error = 1e-1}, true},
          {"WrongByAHundredth", {.error = 1e-2}, true},
          {"NanInTheFirstRow", {.nan_row = 0}, true},
          {"NanInTheLastRow", {.nan_row = 15}, true},
          {"NumbersWithoutKeys", {.fills_empty_rows = true}, true},
          {"WritesNothing", {.writes_nothing = true}, true},
          {"ThrowsAtOnce", {.throws_at = 1}, false},
          {"ThrowsAtItsThirdCall", {.throws_at = 3}, false},
          {"Refuses", {.refuses = "planted to refuse"}, false},
          {"Slow", {.delay = std::chrono::milliseconds(30)}, false}};
}

// The bad one as the first of the platform's order, as its second, and as one that only measuring could choose.
class Planted : public testing::PlantedTest, public ::testing::WithParamInterface<std::tuple<Bad, Enum>> {};

TEST_P(Planted, IsNeverChosen) {
  const auto& [bad, member] = GetParam();
  const Problem problem{.num_heads = 2, .num_kv_heads = 2, .seq_q = 16, .seq_kv = 12, .head_size = 16, .causal = true};
  plant(member, bad.plant);
  const TunedProblem tuned = quickly(problem);
  const TunedResult& result = of(tuned, member);
  std::cout << bad.name << ": error " << result.error << ", " << result.median_ms << " ms, '" << result.reason << "'\n";
  EXPECT_EQ(result.reason.empty() && !(result.error <= 5e-3), bad.is_wrong);

  const auto chosen = tuned_member(problem);
  ASSERT_TRUE(chosen);
  EXPECT_NE(*chosen, member);
  EXPECT_NE(select_backend(problem).member, member);
  EXPECT_NE(computes(problem), member.name());
  EXPECT_EQ(explain(problem).chosen, chosen);

  const Problem others[] = {
      {.num_heads = 2, .num_kv_heads = 2, .seq_q = 16, .seq_kv = 16, .head_size = 16},
      {.num_heads = 2, .num_kv_heads = 1, .seq_q = 100, .seq_kv = 7, .head_size = 40},
      {.num_heads = 2, .num_kv_heads = 2, .seq_q = 5, .seq_kv = 5, .head_size = 16, .causal = true}};
  for (const Problem& other : others) {
    if (!bad.is_wrong) continue;
    EXPECT_NE(select_backend(other).member, member);
    EXPECT_NE(computes(other), member.name());
    EXPECT_NE(explain(other).chosen, member);
  }
  reload_tuned();  // the file says the same
  EXPECT_NE(computes(problem), member.name());
  if (bad.is_wrong) {
    EXPECT_NE(computes(others[0]), member.name());
  }
}

INSTANTIATE_TEST_SUITE_P(Everywhere, Planted,
                         ::testing::Combine(::testing::ValuesIn(bad_ones()),
                                            ::testing::Values(Enum::FLASH_ATTN, Enum::TORCH_SDPA, Enum::SAGE_ATTN)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param).name) + "_" + std::get<1>(test.param).name();
                         });

class PlantedOne : public testing::PlantedTest {};

TEST_F(PlantedOne, NanForOneProblemIsNotTrustedWithOthersThatItDoesRight) {
  plant(Enum::SAGE_ATTN, {.nan_seq = 16});
  Problem other = kSmall;
  other.seq_q = 32;
  EXPECT_TRUE(std::isnan(of(quickly(kSmall), Enum::SAGE_ATTN).error));
  EXPECT_LT(of(quickly(other), Enum::SAGE_ATTN).error, 1e-5);
  EXPECT_NE(tuned_member(other), Enum::SAGE_ATTN) << "the fastest there";
  EXPECT_NE(computes(other), "SAGE_ATTN");
  Problem half = other;
  half.dtype = kFloat16;
  quickly(half);
  EXPECT_EQ(computes(half), "SAGE_ATTN") << "of another dtype, nothing is held against it";
}

TEST_F(PlantedOne, OneWrongRowAmongHundredsIsFound) {
  plant(Enum::SAGE_ATTN, {.nan_row = 3});
  const Problem problem{.num_heads = 48, .num_kv_heads = 48, .seq_q = 10, .seq_kv = 12, .head_size = 16};
  for (const std::uint64_t seed : {0, 1, 2}) {
    EXPECT_TRUE(std::isnan(of(quickly(problem, {.seed = seed}), Enum::SAGE_ATTN).error)) << seed;
  }
}

TEST_F(PlantedOne, OtherDtypesAreAnotherMatter) {
  plant(Enum::FLASH_ATTN, {.error = 0.1});
  quickly(kSmall);
  Problem half = kSmall;
  half.dtype = kBFloat16;
  EXPECT_EQ(computes(half), "FLASH_ATTN");
}

TEST_F(PlantedOne, WhereAllAreWrongTheOrderStands) {
  plant(Enum::FLASH_ATTN, {.error = 0.1});
  plant(Enum::TORCH_SDPA, {.nan_row = 3});
  quickly(kSmall);
  EXPECT_EQ(tuned_member(kSmall), std::nullopt);
  EXPECT_EQ(computes(kSmall), "FLASH_ATTN");
  const Explanation explanation = explain(kSmall);
  EXPECT_EQ(explanation.chosen, Enum::FLASH_ATTN);
  EXPECT_EQ(explanation.why, "the platform's order: nothing was measured to be within 2.0e-05");
  EXPECT_NEAR(explanation.members[0].tuned.value().error, 0.1, 1e-6);
  testing::expect_contains(explanation.members[1].verdict.text(),
                           {"TORCH_SDPA was measured to be wrong by nan in float32, more than 2.0e-05"});
}

TEST_F(PlantedOne, ASuspectIsToldInTheExplanationOfOthers) {
  plant(Enum::FLASH_ATTN, {.error = 0.1});
  quickly(kSmall);
  Problem other = kSmall;
  other.seq_q = 100;
  const Explanation explanation = explain(other);
  EXPECT_EQ(explanation.chosen, Enum::TORCH_SDPA);
  EXPECT_EQ(explanation.members[0].verdict.text(),
            "FLASH_ATTN was measured to be wrong by 1.0e-01 in float32, more than 2.0e-05");
  const testing::LogRecorder log;
  EXPECT_EQ(select_backend(other, "planted_test.suspect").member, Enum::TORCH_SDPA);
}

TEST_F(PlantedOne, ASlowOneIsNotChosenThoughItIsTheFirst) {
  plant(Enum::FLASH_ATTN, {.delay = std::chrono::milliseconds(8)});
  EXPECT_EQ(computes(kSmall), "FLASH_ATTN");
  quickly(kSmall);
  EXPECT_EQ(tuned_member(kSmall), Enum::TORCH_SDPA);
  EXPECT_EQ(computes(kSmall), "TORCH_SDPA");
}

// It is timed once: tuning must not take what is slow and wrong three times more.
TEST_F(PlantedOne, WhatIsSlowOrWrongIsNotTimedInRounds) {
  plant(Enum::SAGE_ATTN, {.nan_row = 0, .delay = std::chrono::milliseconds(40)});
  plant(Enum::CUSTOM, {.delay = std::chrono::milliseconds(40)});
  const TunedProblem tuned = quickly(kSmall);
  EXPECT_EQ(calls(Enum::SAGE_ATTN), 2) << "one for its error, one that warms up";
  EXPECT_EQ(calls(Enum::CUSTOM), 2);
  EXPECT_GE(of(tuned, Enum::CUSTOM).median_ms, 40);
}

TEST_F(PlantedOne, ResultsAreInOrderOfTime) {
  plant(Enum::SAGE_ATTN, {.refuses = "planted to refuse"});
  plant(Enum::TORCH_SDPA, {.delay = std::chrono::milliseconds(5)});
  plant(Enum::CUSTOM, {.throws_at = 2});
  const TunedProblem tuned = quickly(kSmall);
  ASSERT_EQ(tuned.results.size(), 4U) << "those that are not available are not there";
  EXPECT_EQ(tuned.results[0].backend, "FLASH_ATTN");
  EXPECT_EQ(tuned.results[1].backend, "TORCH_SDPA");
  EXPECT_EQ(of(tuned, Enum::SAGE_ATTN).reason, "planted to refuse");
  EXPECT_EQ(of(tuned, Enum::CUSTOM).reason, "CUSTOM threw: planted");
  EXPECT_EQ(of(tuned, Enum::CUSTOM).median_ms, 0);
}

}  // namespace
}  // namespace ditattn
