// Look-ups of what was measured: exactly, nearly, and what must never be mixed; whom results still speak of; the best.

#include "tuner/tuned_table.hpp"

#include <limits>
#include <random>

#include "tests/unit/toy_backend.hpp"
#include "tests/unit/tuner/tuner_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::LogRecorder;
using testing::ToyBackend;
using testing::unused;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

class Table : public testing::TunerTest {
 protected:
  void SetUp() override {
    TunerTest::SetUp();
    use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>("A"));
    use(Enum::TORCH_SDPA, std::make_shared<ToyBackend>("B"));
    use(Enum::SAGE_ATTN, std::make_shared<ToyBackend>("C"));
  }
  static TunedTable table_of(std::vector<TunedProblem> problems) { return TunedTable(problems); }
  static TunedProblem known(const Problem& problem, double ms = 1) {
    return {problem, {measured(Enum::FLASH_ATTN, ms, 1e-7)}};
  }
  // Milliseconds of the entry found; 0: none.
  static double found(const TunedTable& table, const Problem& problem) {
    const TunedEntry* entry = table.find(problem);
    return entry == nullptr ? 0 : entry->usable.at(0).median_ms;
  }
};

const Problem kBase{.batch = 2, .num_heads = 16, .num_kv_heads = 16, .seq_q = 4096, .seq_kv = 1024, .head_size = 64};

template <class T>
Problem with(T Problem::*field, T value, Problem problem = kBase) {
  problem.*field = value;
  return problem;
}

TEST_F(Table, ExactGoesBeforeNear) {
  const Problem near = with(&Problem::seq_q, std::int64_t{4100});
  for (const bool is_near_later : {false, true}) {
    std::vector<TunedProblem> problems{known(kBase, 1), known(near, 2)};
    if (!is_near_later) std::swap(problems[0], problems[1]);
    const TunedTable table(problems);
    EXPECT_EQ(found(table, kBase), 1);
    EXPECT_EQ(found(table, near), 2);
    EXPECT_EQ(found(table, with(&Problem::seq_q, std::int64_t{4099})), is_near_later ? 2 : 1)
        << "the latest is nearest";
  }
}

TEST_F(Table, TheDeviceAndTheLogSumExpDoNotMatter) {
  const TunedTable table = table_of({known(kBase)});
  EXPECT_EQ(found(table, with(&Problem::lse, true)), 1);
}

// Buckets begin at 4, 5, 6 and 7 quarters of powers of two.
TEST_F(Table, NearIsTheSameQuarterOfAPowerOfTwo) {
  for (const auto field : {&Problem::seq_q, &Problem::seq_kv}) {
    for (const std::int64_t begin : {8, 10, 12, 14, 16, 20, 1024, 1280, 1536, 1792, 2048, 1 << 20}) {
      std::int64_t octave = 8;
      while (octave * 2 <= begin) octave *= 2;
      const std::int64_t end = begin + octave / 4;
      const TunedTable table = table_of({known(with(field, begin))});
      EXPECT_EQ(found(table, with(field, begin - 1)), 0) << begin;
      EXPECT_EQ(found(table, with(field, begin)), 1) << begin;
      EXPECT_EQ(found(table, with(field, end - 1)), 1) << begin;
      EXPECT_EQ(found(table, with(field, end)), 0) << begin;
    }
    for (std::int64_t length = 1; length < 8; ++length) {
      const TunedTable table = table_of({known(with(field, length))});
      EXPECT_EQ(found(table, with(field, length)), 1);
      EXPECT_EQ(found(table, with(field, length + 1)), 0) << "short ones are near to none: " << length;
      EXPECT_EQ(found(table, with(field, length - 1)), 0) << length;
    }
  }
}

TEST_F(Table, BatchAndHeadsCountTogether) {
  const TunedTable table = table_of({known(kBase)});  // 32 together
  const auto near = [&](std::int64_t batch, std::int64_t heads, std::int64_t kv_heads) {
    Problem problem = kBase;
    problem.batch = batch;
    problem.num_heads = heads;
    problem.num_kv_heads = kv_heads;
    return found(table, problem) > 0;
  };
  EXPECT_TRUE(near(1, 32, 32));
  EXPECT_TRUE(near(4, 8, 8));
  EXPECT_TRUE(near(1, 39, 39));
  EXPECT_FALSE(near(1, 40, 40));
  EXPECT_FALSE(near(1, 31, 31));
  EXPECT_FALSE(near(2, 16, 8)) << "another ratio of K/V heads";
  EXPECT_FALSE(near(2, 16, 1));
}

TEST_F(Table, WhatIsNoSizeIsNeverMixed) {
  const std::vector<Problem> kinds{kBase,
                                   with(&Problem::dtype, kFloat16),
                                   with(&Problem::dtype, kBFloat16),
                                   with(&Problem::mask, MaskKind::padding),
                                   with(&Problem::mask, MaskKind::boolean),
                                   with(&Problem::mask, MaskKind::additive),
                                   with(&Problem::causal, true),
                                   with(&Problem::joint, true),
                                   with(&Problem::packed, true),
                                   with(&Problem::spans, true),
                                   with(&Problem::fp8_kv, true),
                                   with(&Problem::alignment, std::int64_t{8}),
                                   with(&Problem::head_size, std::int64_t{72}),
                                   with(&Problem::num_kv_heads, std::int64_t{4})};
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    const TunedTable table = table_of({known(kinds[i])});
    for (std::size_t j = 0; j < kinds.size(); ++j) {
      Problem near = kinds[j];
      near.seq_q += 1;
      EXPECT_EQ(found(table, kinds[j]), i == j ? 1 : 0) << i << " " << j;
      EXPECT_EQ(found(table, near), i == j ? 1 : 0) << i << " " << j;
    }
  }
  const TunedTable table = table_of({known(with(&Problem::alignment, std::int64_t{8}))});
  EXPECT_EQ(found(table, with(&Problem::alignment, std::int64_t{2})), 1) << "below 16 bytes, all are alike";
}

TEST_F(Table, ANearProblemWithoutUsableResultsHidesNone) {
  TunedProblem useless = known(with(&Problem::seq_q, std::int64_t{4097}));
  useless.results[0].reason = "it broke down";
  const TunedTable table = table_of({known(kBase), useless});
  EXPECT_EQ(found(table, with(&Problem::seq_q, std::int64_t{4098})), 1);
  ASSERT_NE(table.find(useless.problem), nullptr);
  EXPECT_TRUE(table.find(useless.problem)->usable.empty());
}

TEST_F(Table, UsableIsWhatWasTimedAndIsANumber) {
  const TunedTable table = table_of({{kBase,
                                      {measured(Enum::FLASH_ATTN, 3, 1e-7), measured(Enum::TORCH_SDPA, 2, kNaN),
                                       measured(Enum::SAGE_ATTN, 1, 1e-2)}}});
  const TunedEntry& entry = table.entries()[0];
  ASSERT_EQ(entry.usable.size(), 2U);
  EXPECT_EQ(entry.usable[0].member, Enum::SAGE_ATTN) << "the fastest first, whatever the file's order";
  EXPECT_EQ(entry.of(Enum::TORCH_SDPA), nullptr);
  EXPECT_EQ(entry.tuned.results.size(), 3U);
  const TunedTable untimed = table_of({{kBase, {measured(Enum::FLASH_ATTN, 0, 1e-7)}}});
  EXPECT_TRUE(untimed.entries()[0].usable.empty());
}

TEST_F(Table, TheWorstErrorPerDtypeCounts) {
  const auto one = [](std::int64_t seq, DLDataType dtype, double error, std::string reason = {}) {
    return TunedProblem{{.seq_q = seq, .dtype = dtype}, {measured(Enum::FLASH_ATTN, 1, error, std::move(reason))}};
  };
  EXPECT_FALSE(table_of({}).worst_error(Enum::FLASH_ATTN, kFloat32));
  EXPECT_FALSE(table_of({one(1, kFloat32, 1, "refused")}).worst_error(Enum::FLASH_ATTN, kFloat32));
  const TunedTable table = table_of({one(1, kFloat32, 1e-3), one(2, kFloat32, 0.5), one(3, kFloat32, 1e-7),
                                     one(4, kFloat16, 0.1), one(5, kFloat16, kNaN), one(6, kFloat16, 0.2)});
  EXPECT_EQ(table.worst_error(Enum::FLASH_ATTN, kFloat32), 0.5);
  EXPECT_TRUE(std::isnan(table.worst_error(Enum::FLASH_ATTN, kFloat16).value()));
  EXPECT_FALSE(table.worst_error(Enum::FLASH_ATTN, kBFloat16));
  EXPECT_FALSE(table.worst_error(Enum::TORCH_SDPA, kFloat32));
}

// --- Whom results speak of

TEST_F(Table, OfAnotherClassOrEngineTheyDoNotCountUntilItIsBack) {
  know(kBase, {measured(Enum::SAGE_ATTN, 1, 1e-7), measured(Enum::FLASH_ATTN, 2, 1e-7)});
  EXPECT_EQ(tuned_member(kBase), Enum::SAGE_ATTN);

  const LogRecorder log;
  const std::string other = unused("tuned_table_test.Other");
  register_backend_class(other, std::make_shared<ToyBackend>("C"));
  register_diffusion_backend(Enum::SAGE_ATTN, other);
  for (int call = 0; call < 3; ++call) EXPECT_EQ(tuned_member(kBase), Enum::FLASH_ATTN);
  EXPECT_EQ(tuned(kBase)->results.size(), 1U);
  EXPECT_EQ(tuned_problems(kCpu)[0].results.size(), 2U) << "it is kept";
  register_diffusion_backend(Enum::SAGE_ATTN, "registry_test.SAGE_ATTN.Backend");
  EXPECT_EQ(tuned_member(kBase), Enum::SAGE_ATTN);

  Capabilities newer = testing::toy_capabilities();
  newer.engine = unused("mean of V, version ");
  use(Enum::SAGE_ATTN, std::make_shared<ToyBackend>("C", 1, newer));
  EXPECT_EQ(tuned_member(kBase), Enum::FLASH_ATTN);
  const auto told = [](const std::string& reason) {
    return "What was measured of SAGE_ATTN does not count any more: " + reason + "'. Run `ditattn tune` again.";
  };
  EXPECT_EQ(log.of(LogLevel::info),
            (std::vector<std::string>{told("it was 'registry_test.SAGE_ATTN.Backend', now it is '" + other),
                                      told("its engine was 'mean of V', now it is '" + newer.engine)}));
}

TEST_F(Table, OfUnknownAndUnavailableMembersTheyDoNotCount) {
  struct Unavailable : ToyBackend {
    void validate_available() const override { throw ImportError(reason); }
    const std::string reason = unused("its library went away, number ");
  };
  TunedResult unknown = measured(Enum::SAGE_ATTN, 1, 0);
  unknown.backend = unused("TUNED_TABLE_TEST_NOBODY");
  TunedResult custom = measured(Enum::SAGE_ATTN, 1, 0);
  custom.backend = Enum::define(unused("TUNED_TABLE_TEST_CUSTOM")).name();
  TunedResult nowhere = measured(Enum::TORCH_SDPA, 1, 0);
  nowhere.class_path = unused("tuned_table_test.nowhere.Backend");
  const std::vector<TunedResult> results{unknown, custom, nowhere, measured(Enum::SAGE_ATTN, 1, 0)};
  register_diffusion_backend(Enum::TORCH_SDPA, nowhere.class_path);
  use(Enum::SAGE_ATTN, std::make_shared<Unavailable>());
  const LogRecorder log;
  const TunedTable table = table_of({{kBase, results}, {with(&Problem::causal, true), results}});
  EXPECT_TRUE(table.entries()[0].tuned.results.empty());
  const std::vector<std::string> told = log.of(LogLevel::info);
  ASSERT_EQ(told.size(), 4U) << "each once, for however many problems";
  testing::expect_contains(told[0], {unknown.backend, "Unknown diffusion attention backend"});
  testing::expect_contains(told[1], {custom.backend, "must be registered before use"});
  testing::expect_contains(told[2], {"TORCH_SDPA", "Cannot import '" + nowhere.class_path + "'"});
  testing::expect_contains(told[3], {"SAGE_ATTN", "its library went away"});
}

// --- The best

struct Ordered {
  Enum member;
};
const std::vector<Ordered> kOrder{{Enum::FLASH_ATTN}, {Enum::TORCH_SDPA}};

TunedEntry entry_of(std::vector<TunedEntry::Result> usable) {
  std::ranges::stable_sort(usable, {}, &TunedEntry::Result::median_ms);
  return {.tuned = {}, .usable = std::move(usable)};
}
std::optional<Enum> best(const TunedEntry& entry, double max_error, std::vector<Enum> refused = {}) {
  return best_of(entry, kOrder, max_error,
                 [&](Enum member) { return std::ranges::find(refused, member) == refused.end(); });
}

TEST(BestOf, TheFastestUnlessTheOrderHasOneTwoPercentSlower) {
  const auto against = [](double first_ms) {
    return best(entry_of({{Enum::SAGE_ATTN, 100, 0}, {Enum::FLASH_ATTN, first_ms, 0}}), 0);
  };
  EXPECT_EQ(against(90), Enum::FLASH_ATTN);
  EXPECT_EQ(against(100), Enum::FLASH_ATTN) << "a tie";
  EXPECT_EQ(against(101), Enum::FLASH_ATTN);
  EXPECT_EQ(against(102), Enum::FLASH_ATTN);
  EXPECT_EQ(against(102.1), Enum::SAGE_ATTN);
  // Of the order, the first that is close enough.
  EXPECT_EQ(best(entry_of({{Enum::TORCH_SDPA, 100, 0}, {Enum::FLASH_ATTN, 101, 0}}), 0), Enum::FLASH_ATTN);
  EXPECT_EQ(best(entry_of({{Enum::TORCH_SDPA, 101, 0}, {Enum::FLASH_ATTN, 103, 0}, {Enum::SAGE_ATTN, 100, 0}}), 0),
            Enum::TORCH_SDPA);
}

TEST(BestOf, TheErrorMayBeTheBoundItself) {
  const TunedEntry entry = entry_of({{Enum::SAGE_ATTN, 1, 0.05}, {Enum::TORCH_SDPA, 2, 0.01}, {Enum::CUSTOM, 3, kInf}});
  EXPECT_EQ(best(entry, 0.05), Enum::SAGE_ATTN);
  EXPECT_EQ(best(entry, std::nextafter(0.05, 0)), Enum::TORCH_SDPA);
  EXPECT_EQ(best(entry, 0.009), std::nullopt);
  EXPECT_EQ(best(entry, 0), std::nullopt);
  EXPECT_EQ(best(entry, kInf), Enum::SAGE_ATTN);
  EXPECT_EQ(best(entry_of({{Enum::SAGE_ATTN, 1, kNaN}, {Enum::CUSTOM, 2, kInf}}), 1e308), std::nullopt);
  EXPECT_EQ(best(entry_of({}), kInf), std::nullopt);
  // A preferred one that is close in time but not in error is not taken.
  EXPECT_EQ(best(entry_of({{Enum::SAGE_ATTN, 100, 0}, {Enum::FLASH_ATTN, 101, 1}}), 0.5), Enum::SAGE_ATTN);
}

TEST(BestOf, WhoMayNotBeTakenIsNot) {
  const TunedEntry entry = entry_of({{Enum::SAGE_ATTN, 1, 0}, {Enum::FLASH_ATTN, 5, 0}, {Enum::CUSTOM, 9, 0}});
  EXPECT_EQ(best(entry, 0, {Enum::SAGE_ATTN}), Enum::FLASH_ATTN);
  EXPECT_EQ(best(entry, 0, {Enum::SAGE_ATTN, Enum::FLASH_ATTN}), Enum::CUSTOM);
  EXPECT_EQ(best(entry, 0, {Enum::SAGE_ATTN, Enum::FLASH_ATTN, Enum::CUSTOM}), std::nullopt);
}

// The rule written down again, over random entries.
TEST(BestOf, AgreesWithItsRule) {
  std::mt19937 random(11);
  const std::vector<Enum> all{Enum::FLASH_ATTN, Enum::TORCH_SDPA, Enum::SAGE_ATTN, Enum::SAGE_ATTN_3, Enum::CUSTOM};
  for (int round = 0; round < 5000; ++round) {
    std::vector<TunedEntry::Result> usable;
    std::vector<Enum> refused;
    for (const Enum member : all) {
      if (random() % 3 != 0)
        usable.push_back(
            {member, 1 + static_cast<double>(random() % 8) / 100, static_cast<double>(random() % 4) * 0.1});
      if (random() % 4 == 0) refused.push_back(member);
    }
    const double bound = static_cast<double>(random() % 4) * 0.1;
    std::vector<TunedEntry::Result> good;
    for (const auto& result : usable) {
      if (result.error <= bound && std::ranges::find(refused, result.member) == refused.end()) good.push_back(result);
    }
    const auto chosen = best(entry_of(usable), bound, refused);
    if (good.empty()) {
      EXPECT_FALSE(chosen);
      continue;
    }
    ASSERT_TRUE(chosen);
    const double fastest = std::ranges::min_element(good, {}, &TunedEntry::Result::median_ms)->median_ms;
    const auto close = [&](Enum member) {
      const auto found = std::ranges::find(good, member, &TunedEntry::Result::member);
      return found != good.end() && found->median_ms <= fastest * 1.02;
    };
    if (close(Enum::FLASH_ATTN)) {
      EXPECT_EQ(chosen, Enum::FLASH_ATTN);
    } else if (close(Enum::TORCH_SDPA)) {
      EXPECT_EQ(chosen, Enum::TORCH_SDPA);
    } else {
      EXPECT_EQ(std::ranges::find(good, *chosen, &TunedEntry::Result::member)->median_ms, fastest);
    }
  }
}

}  // namespace
}  // namespace ditattn
