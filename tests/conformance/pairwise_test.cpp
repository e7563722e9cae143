// The committed case files keep their promises: every two values of space.txt meet in pairwise.txt.

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "tests/conformance/case.hpp"

namespace ditattn::conformance {
namespace {

constexpr std::size_t kMaxCases = 600;

const Space::Field& field(const Space& space, const std::string& name) {
  return *std::ranges::find(space.fields, name, &Space::Field::name);
}

TEST(Pairwise, EveryTwoValuesMeet) {
  const Space space = load_space();
  const std::vector<Case> cases = load_cases("pairwise");
  EXPECT_LE(cases.size(), kMaxCases);
  std::set<std::tuple<std::string, std::string, std::string, std::string>> met;
  for (const Case& c : cases) {
    const auto values = split_fields(c.line);
    for (const auto& [a, x] : values) {
      for (const auto& [b, y] : values) met.emplace(a, x, b, y);
    }
  }
  std::size_t pairs = 0;
  for (const auto& a : space.fields) {
    for (const auto& b : space.fields) {
      if (a.name == b.name) continue;
      for (const std::string& x : a.values) {
        for (const std::string& y : b.values) {
          ++pairs;
          EXPECT_TRUE(met.contains({a.name, x, b.name, y}))
              << a.name << "=" << x << " never meets " << b.name << "=" << y;
        }
      }
    }
  }
  EXPECT_GT(pairs, 4000U);
}

TEST(Pairwise, SpaceHasTheSizesThatMatter) {
  const Space space = load_space();
  const std::vector<std::string> head_sizes = {"1", "8", "40", "64", "72", "80", "96", "128", "160", "256", "512"};
  const std::vector<std::string> lengths = {"1", "2", "63", "64", "65", "127", "257", "1000"};
  EXPECT_EQ(field(space, "D").values, head_sizes);
  EXPECT_EQ(field(space, "Sq").values, lengths);
  EXPECT_EQ(field(space, "Skv").values, lengths);
}

TEST(CaseFiles, MistakesAreNamed) {
  const auto message = [](const std::string& line) -> std::string {
    try {
      parse_case(line);
    } catch (const std::exception& error) {
      return error.what();
    }
    return {};
  };
  EXPECT_EQ(message("D=64 Sqq=3"), "unknown field 'Sqq'");
  EXPECT_EQ(message("D=6x"), "D: '6x' is not a number");
  EXPECT_EQ(message("D=64 D=8"), "field 'D' comes twice");
  EXPECT_EQ(message("heads=4"), "heads: '4' is not heads/kv_heads");
  EXPECT_EQ(message("nan=all"), "nan: 'all' is not one of none, hidden, some_rows");
  EXPECT_EQ(message("lse"), "'lse' is not field=value");
}

}  // namespace
}  // namespace ditattn::conformance
