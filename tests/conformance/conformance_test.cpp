// Every backend that computes on the CPU here, over every committed case, against the float64 oracle.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>

#include "tests/conformance/options.hpp"

namespace ditattn::conformance {
namespace {

constexpr int kMaxFailuresShown = 20;

Tally& totals() {
  static Tally instance;
  return instance;
}

// Prints the worst errors of the whole program at its end.
class PrintTotals : public testing::Environment {
 public:
  void TearDown() override { fmt::print("seed {}\n{}", options().seed, totals().table()); }
};
const testing::Environment* const kPrintTotals = testing::AddGlobalTestEnvironment(new PrintTotals);

// A case file, and which part of it.
struct Part {
  const char* file;
  std::size_t shard;
  std::size_t shards;
};
// How GoogleTest, and so CTest, shows it.
std::ostream& operator<<(std::ostream& stream, const Part& part) {
  return stream << part.file << ", part " << part.shard + 1 << " of " << part.shards;
}

class CaseFile : public testing::TestWithParam<Part> {};

TEST_P(CaseFile, EveryBackendAgreesWithTheOracle) {
  const std::vector<NamedBackend> backends = chosen_backends();
  ASSERT_FALSE(backends.empty());
  const std::vector<Case> cases = load_cases(GetParam().file);
  ASSERT_GT(cases.size(), GetParam().shard);
  int failures = 0;
  const auto fail = [&](const std::string& text) {
    if (++failures <= kMaxFailuresShown) ADD_FAILURE() << text;
  };
  for (std::size_t i = GetParam().shard; i < cases.size(); i += GetParam().shards) {
    run_case(cases[i], backends, options().device, options().seed, totals(), fail);
  }
  EXPECT_EQ(failures, 0) << "failures in " << GetParam().file << " (" << kMaxFailuresShown << " at most are shown)";
}

INSTANTIATE_TEST_SUITE_P(Conformance, CaseFile,
                         testing::Values(Part{"pairwise", 0, 4}, Part{"pairwise", 1, 4}, Part{"pairwise", 2, 4},
                                         Part{"pairwise", 3, 4}, Part{"shapes", 0, 1}, Part{"adversarial", 0, 1}),
                         [](const auto& part) { return fmt::format("{}_{}", part.param.file, part.param.shard); });

// The two that every CPU build has must be there, and refuse no case: their contract is any head size, every mask.
TEST(Conformance, FlashAndSdpaTakeEveryCase) {
  std::vector<std::string> members;
  for (const NamedBackend& named : cpu_backends()) members.push_back(named.member);
  for (const char* member : {"FLASH_ATTN", "TORCH_SDPA"}) {
    EXPECT_NE(std::ranges::find(members, member), members.end()) << member << " is not available";
  }
  for (const char* file : {"pairwise", "shapes", "adversarial"}) {
    for (const Case& c : load_cases(file)) {
      for (const NamedBackend& named : cpu_backends()) {
        if (named.member != "FLASH_ATTN" && named.member != "TORCH_SDPA") continue;
        const Verdict verdict = named.backend->explain(problem_of(c));
        EXPECT_TRUE(verdict) << named.member << " [" << c.line << "]: " << verdict.text();
      }
    }
  }
}

}  // namespace
}  // namespace ditattn::conformance
