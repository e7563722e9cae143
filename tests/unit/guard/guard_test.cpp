// What the guard finds in planted wrong numbers, what it leaves alone, and what it reports.

#include "ditattn/guard.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <chrono>
#include <random>
#include <thread>

#include "ditattn/selector.hpp"
#include "tests/unit/guard/planted_backend.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::error_text;
using testing::expect_contains;
using testing::PlantedBackend;
using testing::Spoil;
using testing::times;
using Enum = DiffusionAttentionBackendEnum;

class GuardTest : public testing::RegistryTest {
 protected:
  // (2, rows, 4, 8) against (2, 23, 2, 8).
  static Tensor random(std::int64_t tokens, std::int64_t heads, std::uint64_t seed, DLDataType dtype = kFloat32) {
    Tensor tensor = empty({2, tokens, heads, 8}, dtype);
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, dtype, normal(generator));
    return tensor;
  }
  static std::unique_ptr<AttentionImpl> layer(const Spoil& spoil, const std::string& prefix = "blocks.0.attn",
                                              const std::string& role = "self", bool causal = false) {
    return std::make_shared<PlantedBackend>("PLANTED", spoil)
        ->make({.num_heads = 4, .head_size = 8, .causal = causal, .num_kv_heads = 2, .prefix = prefix, .role = role});
  }
  Tensor call(const AttentionImpl& layer) const { return layer.forward(query_, key_, value_); }
  // The only layer that a report speaks of.
  static GuardedLayer only(const Guard& guard) {
    const GuardReport report = guard.report();
    EXPECT_EQ(report.layers.size(), 1U);
    return report.layers.empty() ? GuardedLayer() : report.layers.front();
  }

  Tensor query_ = random(31, 4, 1);
  Tensor key_ = random(23, 2, 2);
  Tensor value_ = random(23, 2, 3);
};

TEST_F(GuardTest, ErrorOfATenthIsReportedAsThat) {
  const testing::LogRecorder log;
  const Guard guard;
  call(*layer(times(1.1)));
  const GuardedLayer seen = only(guard);
  EXPECT_EQ(seen.layer, "blocks.0.attn");
  EXPECT_EQ(seen.role, "self");
  EXPECT_EQ(seen.backend, "PLANTED");
  EXPECT_EQ(seen.checks, 1U);
  EXPECT_EQ(seen.failures, 1U);
  EXPECT_GT(seen.worst.error, 0.05);
  EXPECT_LT(seen.worst.error, 0.1001);
  EXPECT_LT(seen.worst.bound, 1e-4);
  EXPECT_EQ(guard.report().failures(), 1U);
  ASSERT_EQ(log.of(LogLevel::warning).size(), 1U);
  expect_contains(log.of(LogLevel::warning).front(),
                  {"Guard: layer 'blocks.0.attn' of role 'self', call 0: PLANTED is wrong by ", "worst row: batch "});
}

TEST_F(GuardTest, RightNumbersAreNotReported) {
  for (const DLDataType dtype : {kFloat32, kFloat16, kBFloat16}) {
    const Guard guard({.every = 1});
    const auto exact = layer({});
    exact->forward(random(31, 4, 4, dtype), random(23, 2, 5, dtype), random(23, 2, 6, dtype));
    EXPECT_EQ(only(guard).failures, 0U) << dtype_name(dtype);
    EXPECT_EQ(only(guard).checks, 1U);
  }
}

TEST_F(GuardTest, RightButSlowIsRight) {
  const Guard guard({.every = 1});
  const auto slow =
      layer([](const AttentionCall&, std::uint64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); });
  for (int i = 0; i < 3; ++i) call(*slow);
  EXPECT_EQ(only(guard).failures, 0U);
}

TEST_F(GuardTest, EveryNthCallOfEachLayerIsChecked) {
  const Guard guard({.every = 4});
  const auto first = layer({}, "first");
  const auto second = layer({}, "second");
  for (int i = 0; i < 10; ++i) {
    call(*first);
    if (i % 2 == 0) call(*second);
  }
  const GuardReport report = guard.report();
  ASSERT_EQ(report.layers.size(), 2U);
  for (const GuardedLayer& seen : report.layers) {
    EXPECT_EQ(seen.calls, seen.layer == "first" ? 10U : 5U);
    EXPECT_EQ(seen.checks, seen.layer == "first" ? 3U : 2U);
  }
}

TEST_F(GuardTest, WithoutAGuardNothingIsChecked) {
  Guard guard({.every = 1});
  const auto bad = layer(times(1.1));
  call(*bad);
  guard.end();
  call(*bad);
  EXPECT_EQ(only(guard).calls, 1U);
}

TEST_F(GuardTest, NaNOnOneLayerIsFoundWhereverItStands) {
  std::mt19937_64 generator(9);
  for (int trial = 0; trial < 50; ++trial) {
    const auto at = [&](std::int64_t size) { return static_cast<std::int64_t>(generator() % size); };
    const std::array place = {at(2), at(31), at(4), at(8)};
    const double planted = trial % 2 == 0 ? NAN : -INFINITY;
    const Guard guard({.every = 1, .rows = 1});
    const auto bad = layer([&](const AttentionCall& c, std::uint64_t) {
      testing::set_element(c.out, place[0], place[1], place[2], place[3], planted);
    });
    const auto good = layer({}, "blocks.1.attn");
    call(*good);
    call(*bad);
    const GuardReport report = guard.report();
    ASSERT_EQ(report.layers.size(), 2U);
    const GuardedLayer& worst = report.layers.front();
    EXPECT_EQ(worst.layer, "blocks.0.attn");
    EXPECT_EQ(worst.non_finite, 1U);
    EXPECT_EQ((std::array{worst.worst.batch, worst.worst.query, worst.worst.head}),
              (std::array{place[0], place[1], place[2]}));
    EXPECT_EQ(report.failures(), 1U);
  }
}

TEST_F(GuardTest, OutputsOfAnyStridesAreLookedThrough) {
  const auto bad = layer([](const AttentionCall& c, std::uint64_t) { testing::set_element(c.out, 1, 17, 2, 5, NAN); });
  std::vector<float> memory(2 * 4 * 31 * 11);
  const Tensor by_heads = wrap(memory.data(), {2, 31, 4, 8}, kFloat32, {4 * 31 * 11, 11, 31 * 11, 1});
  const Tensor backwards = wrap(memory.data() + 30 * 4 * 8, {2, 31, 4, 8}, kFloat32, {31 * 4 * 8, -4 * 8, 8, 1});
  for (const Tensor& out : {by_heads, backwards}) {
    const Guard guard({.rows = 1});
    bad->forward(query_, key_, value_, {}, {.out = out});
    EXPECT_EQ(only(guard).non_finite, 1U);
    EXPECT_EQ(only(guard).worst.query, 17);
  }
}

TEST_F(GuardTest, WithoutTheScanOnlySampledRowsAreLookedAt) {
  const Guard guard({.rows = 2, .scan = false});  // of few rows, the first and the last position
  call(*layer([](const AttentionCall& c, std::uint64_t) { testing::set_element(c.out, 0, 15, 0, 0, NAN); }));
  EXPECT_EQ(only(guard).failures, 0U);
}

TEST_F(GuardTest, NaNThatTheInputsMakeIsNobodysFault) {
  const Guard guard({.every = 1, .rows = 500});
  testing::set_element(query_, 1, 4, 2, 0, NAN);
  testing::set_element(value_, 0, 7, 1, 3, INFINITY);
  const Tensor out = call(*layer({}));
  EXPECT_TRUE(std::isnan(testing::element(out, 1, 4, 2, 0)));
  EXPECT_EQ(only(guard).failures, 0U) << guard.report().text();
}

TEST_F(GuardTest, InfiniteInputsDoNotExcuseOtherRows) {
  testing::set_element(key_, 1, 4, 0, 0, INFINITY);
  const Guard guard;
  call(*layer(times(1.1)));
  EXPECT_EQ(only(guard).failures, 1U) << guard.report().text();
}

TEST_F(GuardTest, RowsWithoutKeysMustBeZero) {
  const Tensor mask = empty({2, 23}, kBool);
  for (std::int64_t i = 0; i < mask.numel(); ++i) store_element(mask.data_ptr(), i, kBool, i < 23);
  const AttentionMetadata metadata({.attn_mask = mask});
  const Guard guard({.rows = 500});
  layer([](const AttentionCall& c, std::uint64_t) {
    testing::set_element(c.out, 1, 30, 2, 1, 1e-20);
  })->forward(query_, key_, value_, metadata);
  layer({}, "right")->forward(query_, key_, value_, metadata);
  const GuardReport report = guard.report();
  EXPECT_EQ(report.failures(), 1U);
  EXPECT_EQ(report.layers.front().worst.without_keys, 1);
}

TEST_F(GuardTest, OneWrongHeadIsFound) {
  for (std::int64_t wrong = 0; wrong < 4; ++wrong) {
    const Guard guard;
    call(*layer([&](const AttentionCall& c, std::uint64_t) {
      testing::for_each_element(c.out, [&](std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) {
        if (h == wrong) testing::set_element(c.out, b, i, h, d, 1.1 * testing::element(c.out, b, i, h, d));
      });
    }));
    EXPECT_EQ(only(guard).failures, 1U);
    EXPECT_EQ(only(guard).worst.head, wrong);
  }
}

// Causal: the first rows are many times longer than the last, which are an average. Together they would be within the
// bound of bfloat16.
TEST_F(GuardTest, WrongLastRowsAreFoundBesideLongFirstOnes) {
  const Tensor query = random(400, 4, 7, kBFloat16);
  const Tensor key = random(400, 2, 8, kBFloat16);
  const Guard guard;
  layer(
      [](const AttentionCall& c, std::uint64_t) {
        for (std::int64_t b = 0; b < 2; ++b) {
          for (std::int64_t h = 0; h < 4; ++h) {
            for (std::int64_t d = 0; d < 8; ++d) {
              testing::set_element(c.out, b, 399, h, d, 1.1 * testing::element(c.out, b, 399, h, d));
            }
          }
        }
      },
      "a", "self", true)
      ->forward(query, key, key);
  EXPECT_EQ(only(guard).failures, 1U);
  EXPECT_EQ(only(guard).worst.query, 399);
  EXPECT_GT(only(guard).worst.error, 0.05);
}

TEST_F(GuardTest, ErrorsNowAndThenAreFoundByAndBy) {
  const Spoil every_7th = [](const AttentionCall& c, std::uint64_t count) {
    if (count % 7 == 6) times(1.1)(c, count);
  };
  for (const std::int64_t every : {1, 5}) {
    const Guard guard({.every = every});
    const auto bad = layer(every_7th);
    for (int i = 0; i < 70; ++i) call(*bad);
    EXPECT_EQ(only(guard).failures, every == 1 ? 10U : 2U);  // of 14 checks every 5 calls, 20 and 55
    EXPECT_EQ(only(guard).worst.call % 7, 6U);
  }
}

TEST_F(GuardTest, ABackEndThatThrowsIsNotChecked) {
  const Guard guard({.every = 1});
  const auto failing = layer([](const AttentionCall&, std::uint64_t) { throw Error("RuntimeError", "broken"); });
  EXPECT_EQ(error_text<Error>([&] { call(*failing); }), "broken");
  EXPECT_TRUE(guard.report().layers.empty());
  EXPECT_EQ(guard.report().text(), "The guard saw no call.\n");
}

TEST_F(GuardTest, WhatCannotBeCheckedIsCounted) {
  class Integers final : public PlantedBackend {
   public:
    Integers() : PlantedBackend("INTEGERS", {}, with_integers()) {}

   protected:
    static Capabilities with_integers() {
      Capabilities can = exact_capabilities();
      can.dtypes = {kInt32};
      return can;
    }
    struct Impl final : AttentionImpl {
      using AttentionImpl::AttentionImpl;
      void run(const AttentionCall& /*call*/) const override {}
    };
    [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
      return std::make_unique<Impl>(config);
    }
  };
  const Guard guard;
  const Tensor numbers = random(5, 4, 1, kInt32);
  std::make_shared<Integers>()->make({.num_heads = 4, .head_size = 8})->forward(numbers, numbers, numbers);
  const GuardedLayer seen = only(guard);
  EXPECT_EQ(seen.layer, "INTEGERS 4×8");
  EXPECT_EQ(seen.checks, 0U);
  EXPECT_EQ(seen.not_checked, 1U);
  expect_contains(seen.reason, {"int32"});
}

TEST_F(GuardTest, FiltersByLayerAndRole) {
  const Guard by_layer({.layers = {"blocks.*.attn", "last"}});
  const Guard by_role({.roles = {"self"}});
  for (const char* prefix : {"blocks.0.attn", "blocks.0.other", "last"}) {
    for (const char* role : {"self", "cross"}) call(*layer(times(1.1), prefix, role));
  }
  EXPECT_EQ(by_layer.report().layers.size(), 4U);
  EXPECT_EQ(by_role.report().layers.size(), 3U);
  EXPECT_EQ(by_role.report().failures(), 3U);
}

TEST_F(GuardTest, LayersWithoutANameAreToldApartByRoleThenByBackEndAndSizes) {
  const Guard guard;
  call(*layer({}, "", "self"));
  call(*layer({}, "", "cross"));
  call(*layer({}, "", ""));
  const auto other = std::make_shared<PlantedBackend>("OTHER");
  other->make({.num_heads = 4, .head_size = 8, .num_kv_heads = 2})->forward(query_, key_, value_);
  other->make({.num_heads = 2, .head_size = 8})->forward(key_, key_, value_);
  std::vector<std::string> names;
  for (const GuardedLayer& seen : guard.report().layers) names.push_back(seen.layer + "|" + seen.role);
  std::ranges::sort(names);
  EXPECT_EQ(names, (std::vector<std::string>{"OTHER 2×8|", "OTHER 4×8, 2 K/V heads|", "PLANTED 4×8, 2 K/V heads|",
                                             "|cross", "|self"}));
}

TEST_F(GuardTest, AnErrorOfOnesOwnCounts) {
  for (const double allowed : {0.15, 0.01}) {
    const Guard guard({.max_error = allowed});
    call(*layer(times(1.1)));
    EXPECT_EQ(only(guard).failures, allowed > 0.1 ? 0U : 1U);
    EXPECT_EQ(only(guard).worst.bound, allowed);
  }
}

TEST_F(GuardTest, RaisesWhenTheOutputIsWritten) {
  const Guard guard({.every = 2, .on_failure = GuardAction::raise});
  const auto bad = layer(times(1.1));
  const Tensor out = empty({2, 31, 4, 8}, kFloat32);
  std::fill_n(static_cast<float*>(out.data_ptr()), out.numel(), 0.F);
  const std::string text = error_text<Error>([&] { bad->forward(query_, key_, value_, {}, {.out = out}); });
  expect_contains(text, {"layer 'blocks.0.attn' of role 'self', call 0: PLANTED is wrong by", "allowed are",
                         "worst row: batch", "float32 on cpu", "raised"});
  EXPECT_NE(testing::element(out, 0, 0, 0, 0), 0);
  EXPECT_NO_THROW(call(*bad)) << "call 1 is not due";
  EXPECT_THROW(call(*bad), Error);
  EXPECT_EQ(only(guard).failures, 2U);
}

TEST_F(GuardTest, EventsAreToldAndWhatTheyThrowGoesOn) {
  std::vector<GuardFinding> found;
  {
    const Guard guard({.every = 1, .on_event = [&](const GuardFinding& finding) { found.push_back(finding); }});
    call(*layer({}));
    EXPECT_TRUE(found.empty());
    call(*layer(times(1.1)));
    ASSERT_EQ(found.size(), 1U);
    EXPECT_EQ(found.front().call, 1U) << "one name is one layer";
    EXPECT_TRUE(found.front().failed());
  }
  const Guard guard({.on_event = [](const GuardFinding&) { throw std::runtime_error("mine"); }});
  EXPECT_THROW(call(*layer(times(1.1))), std::runtime_error);
}

TEST_F(GuardTest, TwoGuardsAtOnceEachFindTheirOwn) {
  const Guard strict({.every = 1});
  const Guard loose({.every = 3, .max_error = 0.5});
  const auto bad = layer(times(1.1));
  for (int i = 0; i < 6; ++i) call(*bad);
  EXPECT_EQ(only(strict).failures, 6U);
  EXPECT_EQ(only(loose).checks, 2U);
  EXPECT_EQ(only(loose).failures, 0U);
}

TEST_F(GuardTest, BehindAPlatformsDefaultTheOneThatComputedIsNamed) {
  Capabilities small = PlantedBackend::exact_capabilities();
  small.head_sizes.max = 4;
  use(Enum::FLASH_ATTN, std::make_shared<PlantedBackend>("SMALL", Spoil(), small));
  use(Enum::TORCH_SDPA, std::make_shared<PlantedBackend>("ANY", times(1.1)));
  const testing::ScopedEnvironment unset("DIFFUSION_ATTENTION_BACKEND", nullptr);
  const Guard guard;
  call(*get_attn_backend_for_role("self").backend->make(
      {.num_heads = 4, .head_size = 8, .num_kv_heads = 2, .prefix = "a"}));
  EXPECT_EQ(only(guard).backend, "ANY");
}

TEST_F(GuardTest, WorstComesFirstInTextAndJson) {
  const Guard guard({.every = 1});
  call(*layer(times(1.001), "b.small"));
  call(*layer({}, "a.none"));
  call(*layer(times(1.3), "c.large"));
  call(*layer([](const AttentionCall& c, std::uint64_t) { testing::set_element(c.out, 0, 1, 2, 3, NAN); }, "d.nan"));
  const GuardReport report = guard.report();
  const std::string text = report.text();
  const std::array order = {text.find("d.nan"), text.find("c.large"), text.find("b.small"), text.find("a.none")};
  EXPECT_TRUE(std::ranges::is_sorted(order)) << text;
  expect_contains(text, {"layer", "back end", "worst", "allowed", "1 elements NaN or infinite", "inf"});
  const auto json = nlohmann::json::parse(report.json());
  EXPECT_EQ(json["failures"], 3);
  EXPECT_EQ(json["layers"][0]["layer"], "d.nan");
  EXPECT_TRUE(json["layers"][0]["worst"]["error"].is_null());
  EXPECT_EQ(json["layers"][0]["worst"]["row"], (std::vector<int>{0, 2, 1}));
  EXPECT_NEAR(json["layers"][1]["worst"]["error"].get<double>(), 0.3, 0.15);
}

TEST_F(GuardTest, OptionsThatMakeNoSenseAreRefused) {
  expect_contains(error_text<ValueError>([] { const Guard guard({.every = 0}); }), {"every=0", "1 at least"});
  expect_contains(error_text<ValueError>([] { const Guard guard({.rows = 0}); }), {"rows=0", "1 at least"});
  expect_contains(error_text<ValueError>([] { const Guard guard({.max_error = NAN}); }), {"max_error=nan"});
  expect_contains(error_text<ValueError>([] { const Guard guard({.max_error = -1.}); }), {"max_error=-1"});
  EXPECT_THROW(const Guard guard({.safer = "NO_SUCH"}), UnknownBackendError);
  EXPECT_THROW(const Guard guard({.safer = "CUSTOM"}), NotRegisteredError);
}

}  // namespace
}  // namespace ditattn
