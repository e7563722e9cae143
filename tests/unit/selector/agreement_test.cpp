// What explain says, what select_backend chooses and who computes a call, over random back ends, configurations,
// measurements and problems: they must agree, since one is there to tell of the others.

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/unit/selector/planted_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::Plant;

class Agreement : public testing::PlantedTest {
 protected:
  bool chance(int percent) { return static_cast<int>(random_() % 100) < percent; }
  template <class T>
  T one_of(const std::vector<T>& values) {
    return values[random_() % values.size()];
  }

  Plant random_plant() {
    Plant plant{};
    plant.is_unavailable = chance(20);
    if (chance(20)) plant.refuses = "planted to refuse";
    if (chance(25)) plant.can.head_sizes.max = 8;
    plant.can.lse = chance(70);
    plant.can.causal = chance(80);
    if (chance(40)) plant.can.causal_alignment = CausalAlignment::top_left;
    return plant;
  }

  std::string random_names() {
    std::vector<std::string> names;
    for (int i = 0; i < 2; ++i) names.push_back(fmt::format("\"{}\"", one_of(kMembers).name()));
    if (names[0] == names[1]) names.pop_back();
    return fmt::format("[{}]", fmt::join(names, ", "));
  }

  std::string random_spec() {
    std::vector<std::string> entries;
    const bool is_named = chance(50);
    const std::string policy = one_of<std::string>({"", "error", "warn", "allow"});
    entries.push_back(fmt::format(R"("backend": "{}")", is_named ? one_of(kMembers).name() : "auto"));
    if (!policy.empty()) entries.push_back(fmt::format(R"("on_unusable": "{}")", policy));
    if (chance(40) && (!is_named || policy == "warn" || policy == "allow")) {
      entries.push_back(fmt::format(R"("allowed": {})", random_names()));
    }
    if (!is_named && chance(40)) entries.push_back(fmt::format(R"("max_error": {})", one_of<double>({0, 0.01, 0.1})));
    return fmt::format("{{{}}}", fmt::join(entries, ", "));
  }

  // One that was measured, often.
  Problem random_problem() {
    if (!known_.empty() && chance(50)) return one_of(known_);
    return {.batch = 1,
            .num_heads = 2,
            .num_kv_heads = 2,
            .seq_q = one_of<std::int64_t>({4, 16, 17}),
            .seq_kv = one_of<std::int64_t>({4, 16}),
            .head_size = one_of<std::int64_t>({8, 16}),
            .causal = chance(40),
            .lse = chance(30)};
  }

  // Measurements of some members that are there, as if `tune` had made them.
  void know_something() {
    std::vector<TunedProblem> problems;
    known_.clear();
    for (int i = 0; i < static_cast<int>(random_() % 4); ++i) {
      TunedProblem tuned{.problem = random_problem(), .results = {}};
      for (const Enum member : kMembers) {
        if (chance(40)) continue;
        tuned.results.push_back(measured(member, static_cast<double>(random_() % 5 + 1),
                                         one_of<double>({1e-7, 1e-7, 1e-7, 1e-7, 0.01, 0.05, 0.5, std::nan("")}),
                                         chance(10) ? "it broke down" : ""));
      }
      problems.push_back(std::move(tuned));
    }
    if (problems.empty()) {
      std::filesystem::remove(tune_cache_file(kCpu));
    } else {
      publish_tuned(tune_cache_file(kCpu), tuned_for(kCpu), problems);
    }
    for (const TunedProblem& tuned : problems) known_.push_back(tuned.problem);
    reload_tuned();
  }

  static void forward(const Problem& problem, const BackendClass& backend) {
    NormalTensors normal(1, kFloat32);
    const Tensor query = normal.next({1, problem.seq_q, 2, problem.head_size});
    const Tensor key = normal.next({1, problem.seq_kv, 2, problem.head_size});
    const auto layer = backend->make({.num_heads = 2, .head_size = problem.head_size, .causal = problem.causal});
    const Tensor lse = problem.lse ? empty({1, 2, problem.seq_q}, kFloat32) : Tensor();
    layer->forward(query, key, key, {}, {.out = {}, .lse = lse});
  }

  // Who computes where a layer is built before its problem is known; empty where something throws.
  std::string computes(const Problem& problem, const AttentionConfig& config) {
    const auto counts = computing([&] {
      try {
        forward(problem, get_attn_backend_for_role("self", problem.head_size, config).backend);
      } catch (const Error&) {
      }
    });
    return counts.empty() ? "" : counts.begin()->first;
  }

  static double max_error_of(const AttentionConfig& config) {
    const auto found = config.per_role.find("self");
    if (found == config.per_role.end() || !found->second.max_error) return exact_error(kFloat32);
    return *found->second.max_error;
  }

  std::vector<Problem> known_;
  const std::vector<Enum> kMembers{Enum::FLASH_ATTN, Enum::TORCH_SDPA, Enum::SAGE_ATTN, Enum::CUSTOM};
  std::mt19937 random_{20261126};
};

TEST_F(Agreement, OfWhatIsToldChosenAndDone) {
  int chosen = 0;
  int by_measurement = 0;
  int moved = 0;
  constexpr int rounds = 1000;
  for (int round = 0; round < rounds; ++round) {
    for (const Enum member : kMembers) plant(member, random_plant());
    if (round % 3 == 0) know_something();
    const std::string text = fmt::format(R"({{"per_role": {{"self": {}}}}})", random_spec());
    const AttentionConfig config = AttentionConfig::from_json(text);
    const Problem problem = random_problem();
    SCOPED_TRACE(fmt::format("round {}: {} Sq={} Skv={} D={} causal={} lse={}", round, text, problem.seq_q,
                             problem.seq_kv, problem.head_size, problem.causal, problem.lse));

    const testing::LogRecorder log;
    const Explanation told = explain(problem, "self", config);
    EXPECT_TRUE(log.of(LogLevel::warning).empty());
    EXPECT_EQ(std::ranges::count_if(log.entries, [](const auto& entry) { return entry.second.find("count") == 0; }), 0);
    const std::string name = told.chosen ? told.chosen->name() : "";

    // 1. Who computes.
    EXPECT_EQ(computes(problem, config), name);
    // 2. Who is selected for the problem, or that nobody is: a choice that nothing replaces is left to `forward`.
    try {
      const Selection selected = select_backend(problem, "self", config);
      if (told.chosen) {
        EXPECT_EQ(selected.member, *told.chosen);
        EXPECT_EQ(selected.backend, told.chosen->get_class());
      } else {
        EXPECT_TRUE(selected.is_explicit) << "somebody was selected, nobody was told";
      }
      EXPECT_EQ(selected.source, told.source);
      EXPECT_EQ(selected.is_explicit, told.is_explicit);
    } catch (const Error& error) {
      EXPECT_FALSE(told.chosen) << error.message();
    }
    // 3. What the explanation says of itself.
    ASSERT_GE(told.members.size(), kMembers.size());
    const bool is_bounded = text.find("allowed") != std::string::npos;
    bool is_before = true;
    for (const MemberVerdict& answer : told.members) {
      if (told.chosen && answer.member == *told.chosen) {
        EXPECT_TRUE(answer.verdict) << answer.verdict.text();
        EXPECT_TRUE(answer.is_candidate);
        is_before = false;
      } else if (is_before && answer.is_candidate && told.why.find("measured:") != 0) {
        EXPECT_FALSE(answer.verdict) << answer.member << " goes before and nothing speaks against it";
      }
      if (answer.is_candidate && is_bounded && told.why.find("measured:") == 0) {
        EXPECT_NE(text.find(answer.member.name()), std::string::npos) << "only the allowed are tried";
      }
      EXPECT_EQ(answer.tuned && told.is_explicit, false);
    }
    if (!told.is_explicit && told.why.find("measured:") == 0) {
      EXPECT_EQ(tuned(problem).has_value(), true);
      const auto& answer = *std::ranges::find(told.members, *told.chosen, &MemberVerdict::member);
      ASSERT_TRUE(answer.tuned);
      EXPECT_LE(answer.tuned->error, max_error_of(config));
      ++by_measurement;
    }
    chosen += told.chosen.has_value();
    moved += told.chosen && told.members.front().member != *told.chosen;
  }
  std::cout << rounds << " rounds: somebody was chosen in " << chosen << ", by measurement in " << by_measurement
            << ", not the first in " << moved << "\n";
  EXPECT_GT(by_measurement, rounds / 50);
  EXPECT_GT(moved, rounds / 10);
}

// Where nobody configures anything, tuned_member and select_backend agree too.
TEST_F(Agreement, OfTunedMemberAndTheDefault) {
  int known = 0;
  for (int round = 0; round < 200; ++round) {
    for (const Enum member : kMembers) plant(member, random_plant());
    know_something();
    const Problem problem = random_problem();
    SCOPED_TRACE(round);
    const auto member = tuned_member(problem);
    const Explanation told = explain(problem);
    EXPECT_EQ(member.has_value(), told.why.find("measured:") == 0);
    if (member) {
      EXPECT_EQ(told.chosen, member);
      EXPECT_EQ(select_backend(problem).member, *member);
      ++known;
    }
  }
  EXPECT_GT(known, 5);
}

}  // namespace
}  // namespace ditattn
