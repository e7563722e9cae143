// A guard that replaces: whose calls a safer back end makes, from when on, which one, and that the numbers are then
// right.

#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "ditattn/guard.hpp"
#include "ditattn/launches.hpp"
#include "tests/unit/guard/planted_backend.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::expect_contains;
using testing::PlantedBackend;
using testing::Spoil;
using testing::times;
using Enum = DiffusionAttentionBackendEnum;

class GuardReplaces : public testing::RegistryTest {
 protected:
  void SetUp() override {
    use(Enum::FLASH_ATTN, std::make_shared<PlantedBackend>("EXACT_A"));
    use(Enum::TORCH_SDPA, std::make_shared<PlantedBackend>("EXACT_B"));
    std::mt19937_64 generator(1);
    std::normal_distribution<double> normal;
    for (const Tensor& tensor : {query_, key_, value_}) {
      for (std::int64_t i = 0; i < tensor.numel(); ++i)
        store_element(tensor.data_ptr(), i, kFloat32, normal(generator));
    }
    right_ = std::make_shared<PlantedBackend>("EXACT")->make(config("", ""))->forward(query_, key_, value_);
  }

  static ImplConfig config(const std::string& prefix, const std::string& role) {
    return {.num_heads = 4, .head_size = 8, .softmax_scale = 0.5, .num_kv_heads = 2, .prefix = prefix, .role = role};
  }
  static std::unique_ptr<AttentionImpl> bad_layer(const std::string& prefix = "a", const std::string& role = "self") {
    return std::make_shared<PlantedBackend>("BAD", times(1.1))->make(config(prefix, role));
  }
  [[nodiscard]] bool is_right(const AttentionImpl& layer) const {
    const Tensor out = layer.forward(query_, key_, value_);
    return std::memcmp(out.data_ptr(), right_.data_ptr(), static_cast<std::size_t>(4 * out.numel())) == 0;
  }
  static GuardOptions replacing(std::int64_t every = 100) {
    return {.every = every, .on_failure = GuardAction::replace};
  }
  static std::map<std::string, std::uint64_t> launches() {
    std::map<std::string, std::uint64_t> counts;
    for (const LaunchCount& count : launch_counts()) counts[count.role + "|" + count.backend] += count.calls;
    return counts;
  }
  static GuardedLayer of(const Guard& guard, const std::string& layer) {
    for (const GuardedLayer& seen : guard.report().layers) {
      if (seen.layer == layer) return seen;
    }
    ADD_FAILURE() << "no layer " << layer;
    return {};
  }

  Tensor query_ = empty({1, 19, 4, 8}, kFloat32);
  Tensor key_ = empty({1, 13, 2, 8}, kFloat32);
  Tensor value_ = empty({1, 13, 2, 8}, kFloat32);
  Tensor right_;
};

TEST_F(GuardReplaces, FromTheFailingCallOn) {
  const testing::LogRecorder log;
  const auto layer = bad_layer();
  reset_launch_counts();
  {
    const Guard guard(replacing());
    for (int i = 0; i < 5; ++i) EXPECT_TRUE(is_right(*layer)) << "call " << i;
    EXPECT_EQ(of(guard, "a").replaced_by, "EXACT_A");
    EXPECT_EQ(of(guard, "a").replaced_at, 0U);
    EXPECT_EQ(of(guard, "a").failures, 1U);
    EXPECT_EQ(of(guard, "a").calls, 5U);
    expect_contains(guard.report().text(), {"EXACT_A from call 0 on"});
  }
  EXPECT_EQ(launches(), (std::map<std::string, std::uint64_t>{{"self|BAD", 1}, {"self|EXACT_A", 5}}));
  EXPECT_FALSE(is_right(*layer)) << "without the guard as before";
  ASSERT_EQ(log.of(LogLevel::warning).size(), 1U);
  expect_contains(log.of(LogLevel::warning).front(),
                  {"layer 'a' of role 'self', call 0: BAD is wrong by", "allowed are",
                   "EXACT_A replaces BAD in this layer, from this call on"});
}

TEST_F(GuardReplaces, WhatIsNotCheckedYetIsNotReplaced) {
  const Guard guard(replacing(3));
  const Spoil later = [](const AttentionCall& c, std::uint64_t count) {
    if (count > 0) times(1.1)(c, count);
  };
  const auto layer = std::make_shared<PlantedBackend>("LATER", later)->make(config("a", "self"));
  std::array<bool, 6> right{};
  for (bool& each : right) each = is_right(*layer);
  EXPECT_EQ(right, (std::array{true, false, false, true, true, true}));
  EXPECT_EQ(of(guard, "a").replaced_at, 3U);
}

// The second layer of the role fails from its second call on, which no check sees; another role's stays as it is.
TEST_F(GuardReplaces, ALayerOrItsRole) {
  const Spoil later = [](const AttentionCall& c, std::uint64_t count) {
    if (count > 0) times(1.1)(c, count);
  };
  for (const GuardScope scope : {GuardScope::layer, GuardScope::role}) {
    GuardOptions options = replacing();
    options.scope = scope;
    const Guard guard(options);
    const auto first = bad_layer("first", "self");
    const auto second = std::make_shared<PlantedBackend>("LATER", later)->make(config("second", "self"));
    const auto other = std::make_shared<PlantedBackend>("LATER", later)->make(config("other", "cross"));
    EXPECT_TRUE(is_right(*second));
    EXPECT_TRUE(is_right(*other));
    EXPECT_TRUE(is_right(*first));
    EXPECT_EQ(is_right(*second), scope == GuardScope::role);
    EXPECT_FALSE(is_right(*other));
    EXPECT_EQ(of(guard, "second").replaced_by, scope == GuardScope::role ? "EXACT_A" : "");
    EXPECT_EQ(of(guard, "other").replaced_by, "");
  }
}

TEST_F(GuardReplaces, ByTheOneAskedFor) {
  GuardOptions options = replacing();
  options.safer = "torch_sdpa";
  const Guard guard(options);
  EXPECT_TRUE(is_right(*bad_layer()));
  EXPECT_EQ(of(guard, "a").replaced_by, "EXACT_B");
}

TEST_F(GuardReplaces, ByTheNextWhereTheFirstIsWrongThrowsOrRefuses) {
  Capabilities small = PlantedBackend::exact_capabilities();
  small.head_sizes.max = 4;
  const auto throws = [](const AttentionCall&, std::uint64_t) { throw Error("MemoryError", "no memory"); };
  for (const auto& first :
       {std::make_shared<PlantedBackend>("FIRST", times(0.9)), std::make_shared<PlantedBackend>("FIRST", throws),
        std::make_shared<PlantedBackend>("FIRST", Spoil(), small)}) {
    use(Enum::FLASH_ATTN, first);
    const Guard guard(replacing(1));
    const auto layer = bad_layer();
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(is_right(*layer));
    EXPECT_EQ(of(guard, "a").replaced_by, "EXACT_B");
    EXPECT_EQ(of(guard, "a").failures, 1U);
  }
}

TEST_F(GuardReplaces, AReplacementThatFailsLaterIsReplacedInTurn) {
  const Spoil later = [](const AttentionCall& c, std::uint64_t count) {
    if (count >= 2) times(1.1)(c, count);
  };
  use(Enum::FLASH_ATTN, std::make_shared<PlantedBackend>("TIRES", later));
  const Guard guard(replacing(1));
  const auto layer = bad_layer();
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(is_right(*layer)) << i;
  EXPECT_EQ(of(guard, "a").replaced_by, "EXACT_B");
  EXPECT_EQ(of(guard, "a").replaced_at, 2U);
  EXPECT_EQ(of(guard, "a").failures, 2U);
}

TEST_F(GuardReplaces, NothingWhereNobodyIsSafer) {
  const testing::LogRecorder log;
  use(Enum::FLASH_ATTN, std::make_shared<PlantedBackend>("WRONG_TOO", times(0.9)));
  Capabilities without_gqa = PlantedBackend::exact_capabilities();
  without_gqa.gqa = false;
  use(Enum::TORCH_SDPA, std::make_shared<PlantedBackend>("NO_GQA", Spoil(), without_gqa));
  const Guard guard(replacing(2));
  const auto layer = bad_layer();
  for (int i = 0; i < 4; ++i) {
    const Tensor out = layer->forward(query_, key_, value_);
    EXPECT_NEAR(testing::element(out, 0, 3, 1, 2), 1.1 * testing::element(right_, 0, 3, 1, 2), 1e-6) << "as it was";
  }
  EXPECT_EQ(of(guard, "a").replaced_by, "");
  EXPECT_EQ(of(guard, "a").failures, 2U);
  ASSERT_EQ(log.of(LogLevel::warning).size(), 1U) << "not at every check";
  expect_contains(log.of(LogLevel::warning).front(), {"no safer back end", "WRONG_TOO is wrong by", "NO_GQA"});
}

TEST_F(GuardReplaces, NeverByOneThatAlignsCausalityOtherwise) {
  Capabilities top_left = PlantedBackend::exact_capabilities();
  top_left.causal_alignment = CausalAlignment::top_left;
  use(Enum::FLASH_ATTN, std::make_shared<PlantedBackend>("TOP_LEFT", Spoil(), top_left));
  ImplConfig causal = config("a", "self");
  causal.causal = true;
  const auto bad = std::make_shared<PlantedBackend>("BAD", times(1.1));
  const Guard guard(replacing());
  bad->make(causal)->forward(query_, key_, value_);
  EXPECT_EQ(of(guard, "a").replaced_by, "EXACT_B");
  causal.prefix = "square";
  causal.num_heads = 2;
  bad->make(causal)->forward(key_, key_, value_);
  EXPECT_EQ(of(guard, "square").replaced_by, "TOP_LEFT") << "where it makes no difference";
  const auto square = bad->make(causal);
  square->forward(key_, key_, value_);
  EXPECT_EQ(of(guard, "square").replaced_by, "TOP_LEFT");
  const Tensor longer = empty({1, 19, 2, 8}, kFloat32);
  std::fill_n(static_cast<float*>(longer.data_ptr()), longer.numel(), 0.5F);
  square->forward(longer, key_, value_);
  EXPECT_EQ(of(guard, "square").replaced_by, "EXACT_B") << "in calls that are not checked, too";
}

TEST_F(GuardReplaces, TheLseToo) {
  const auto spoil = [](const AttentionCall& c, std::uint64_t count) {
    times(1.1)(c, count);
    if (c.lse.defined()) store_element(c.lse.data_ptr(), 5, kFloat32, 77);
  };
  const auto layer = std::make_shared<PlantedBackend>("BAD", spoil)->make(config("a", ""));
  const Tensor lse = empty({1, 4, 19}, kFloat32);
  const Tensor expected = empty({1, 4, 19}, kFloat32);
  std::make_shared<PlantedBackend>("EXACT")->make(config("", ""))->forward(query_, key_, value_, {}, {.lse = expected});
  const Guard guard(replacing());
  layer->forward(query_, key_, value_, {}, {.lse = lse});
  EXPECT_EQ(std::memcmp(lse.data_ptr(), expected.data_ptr(), 4 * 4 * 19), 0);
}

TEST_F(GuardReplaces, LayersOfOneNameAndOtherSizesEachTheirOwn) {
  const Guard guard(replacing(1));
  const auto bad = std::make_shared<PlantedBackend>("BAD", times(1.1));
  ImplConfig other = config("a", "self");
  other.softmax_scale = 0.1;
  const auto layer = bad->make(config("a", "self"));
  const auto same_name = bad->make(other);
  const Tensor expected = std::make_shared<PlantedBackend>("EXACT")->make(other)->forward(query_, key_, value_);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(is_right(*layer));
    const Tensor out = same_name->forward(query_, key_, value_);
    EXPECT_EQ(std::memcmp(out.data_ptr(), expected.data_ptr(), static_cast<std::size_t>(4 * out.numel())), 0);
  }
}

TEST_F(GuardReplaces, ManyThreadsGetRightNumbers) {
  const Guard guard(replacing(3));
  const Guard another({.every = 2});
  const std::array layers = {bad_layer("0"), bad_layer("1"), bad_layer("2", "cross")};
  std::array<std::atomic<int>, 3> wrong{};
  std::array<std::thread, 4> threads;
  for (std::thread& thread : threads) {
    thread = std::thread([&] {
      for (int i = 0; i < 30; ++i) {
        for (std::size_t l = 0; l < layers.size(); ++l) wrong[l] += is_right(*layers[l]) ? 0 : 1;
        static_cast<void>(guard.report());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    EXPECT_LE(wrong[l], 3) << "those that had begun when the first failed";
    const GuardedLayer seen = of(guard, std::to_string(l));
    EXPECT_EQ(seen.calls, 120U);
    EXPECT_EQ(seen.checks, 40U);
    EXPECT_EQ(seen.replaced_by, "EXACT_A");
  }
}

}  // namespace
}  // namespace ditattn
