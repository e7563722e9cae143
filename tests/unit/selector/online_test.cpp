// DITATTN_TUNE=online: an unknown problem is measured at its first call, once, with the tensors it has.

#include <gtest/gtest.h>

#include <fstream>

#include "tests/unit/selector/planted_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::kSmall;
using testing::LogRecorder;
using testing::ScopedEnvironment;

class Online : public testing::PlantedTest {
 protected:
  void SetUp() override {
    PlantedTest::SetUp();
    plant(Enum::SAGE_ATTN, {});
  }

  // Who computes more than once in `body`: once each is what a choice takes, and measuring takes more.
  template <class Body>
  int calls_in(const Body& body) const {
    int all = 0;
    for (const auto& [name, count] : computing(body)) all += count;
    return all;
  }

  const ScopedEnvironment online_{"DITATTN_TUNE", "online"};
};

TEST_F(Online, TheFirstCallMeasuresAndTheNextDoNot) {
  EXPECT_FALSE(tuned(kSmall));
  EXPECT_GT(calls_in([] { forward(kSmall); }), 10);
  ASSERT_TRUE(tuned(kSmall));
  EXPECT_EQ(tuned(kSmall)->results.size(), 3U);
  EXPECT_EQ(tuned_member(kSmall), Enum::SAGE_ATTN);
  for (int call = 0; call < 3; ++call) EXPECT_EQ(computes(kSmall), "SAGE_ATTN");
  EXPECT_EQ(calls_in([] { forward(kSmall); }), 1);
  EXPECT_EQ(read_tune_cache(tune_cache_file(kCpu), tuned_for(kCpu), true).size(), 1U) << "it is published";
}

TEST_F(Online, ALayerThatWasThereBeforeMeasuresToo) {
  const auto layer = get_attn_backend_for_role("self", 16).backend->make({.num_heads = 2, .head_size = 16});
  NormalTensors normal(1, kFloat32);
  const Tensor x = normal.next({1, 16, 2, 16});
  EXPECT_GT(calls_in([&] { layer->forward(x, x, x); }), 10);
  EXPECT_EQ(calls_in([&] { layer->forward(x, x, x); }), 1);
}

TEST_F(Online, ANearProblemIsNotMeasured) {
  forward(kSmall);
  Problem near = kSmall;
  near.seq_q = 18;
  EXPECT_EQ(calls_in([&] { forward(near); }), 1);
  Problem far = kSmall;
  far.seq_q = 28;
  EXPECT_GT(calls_in([&] { forward(far); }), 10);
}

TEST_F(Online, ChoicesByNameAreNotMeasured) {
  EXPECT_EQ(calls_in([] { forward(kSmall, {.backend = "FLASH_ATTN"}); }), 1);
  EXPECT_FALSE(tuned(kSmall));
}

TEST_F(Online, TheTensorsAreThoseOfTheCall) {
  plant(Enum::SAGE_ATTN, {.fears_the_mark = true});
  NormalTensors normal(3, kFloat32);
  const Tensor query = normal.next({1, 16, 2, 16});
  store_element(data_pointer(query), 0, kFloat32, testing::kMark);
  const Tensor key = normal.next({1, 12, 2, 16});
  const Tensor out = attention(query, key, key);
  EXPECT_TRUE(std::isnan(of(tuned(kSmall).value(), Enum::SAGE_ATTN).error));
  const Tensor named = attention(query, key, key, {.backend = "FLASH_ATTN"});
  for (std::int64_t i = 0; i < out.numel(); ++i) {
    ASSERT_EQ(load_element(data_pointer(out), i, kFloat32), load_element(data_pointer(named), i, kFloat32)) << i;
  }
}

TEST_F(Online, WhoThrowsIsNotChosenAndTheCallGoesOn) {
  plant(Enum::SAGE_ATTN, {.throws_at = 1});
  plant(Enum::FLASH_ATTN, {.throws_at = 3});
  EXPECT_EQ(computing([] { forward(kSmall); }).size(), 3U);
  EXPECT_EQ(of(*tuned(kSmall), Enum::SAGE_ATTN).reason, "SAGE_ATTN threw: planted");
  EXPECT_EQ(of(*tuned(kSmall), Enum::FLASH_ATTN).reason, "FLASH_ATTN threw: planted");
  EXPECT_EQ(computes(kSmall), "TORCH_SDPA");
}

TEST_F(Online, WhereNothingCanBeWrittenItWarnsAndUsesWhatItMeasured) {
  std::ofstream(folder_.path() / "file") << "x";
  const ScopedEnvironment cache("DITATTN_TUNE_CACHE", (folder_.path() / "file" / "cache").c_str());
  reload_tuned();
  const LogRecorder log;
  forward(kSmall);
  EXPECT_EQ(computes(kSmall), "SAGE_ATTN");
  const auto warnings = log.of(LogLevel::warning);
  ASSERT_EQ(warnings.size(), 1U);
  testing::expect_contains(warnings[0], {"Measuring at the first call failed: Cannot make the folder"});
}

TEST_F(Online, ARoleWithFewerAllowedDoesNotHideTheOthers) {
  const AttentionConfig config = AttentionConfig::from_json(
      R"({"per_role": {"self": {"backend": "auto", "allowed": ["TORCH_SDPA", "FLASH_ATTN"]}}})");
  plant(Enum::FLASH_ATTN, {.delay = std::chrono::milliseconds(5)});
  forward(kSmall, {.role = "self", .config = config});
  EXPECT_EQ(computes(kSmall, {.role = "self", .config = config}), "TORCH_SDPA");
  EXPECT_EQ(computes(kSmall), "SAGE_ATTN") << "all were measured";
}

// A class over others, of the user's.
TEST_F(Online, OneThatIsMeasuredMayAskForADefaultItself) {
  struct Wrapper final : testing::ToyBackend {
    Wrapper() : ToyBackend("WRAPPER") {}
    [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
      struct Impl final : AttentionImpl {
        using AttentionImpl::AttentionImpl;
        void run(const AttentionCall& call) const override {
          const AttentionConfig others = AttentionConfig::from_json(
              R"({"default": {"backend": "auto", "allowed": ["FLASH_ATTN", "TORCH_SDPA"]}})");
          attention(call.query, call.key, call.value, {.config = others}, {}, {.out = call.out, .lse = {}});
        }
      };
      return std::make_unique<Impl>(config);
    }
  };
  use(Enum::CUSTOM, std::make_shared<Wrapper>());
  forward(kSmall);
  EXPECT_EQ(of(*tuned(kSmall), Enum::CUSTOM).reason, "");
  EXPECT_EQ(computes(kSmall), "SAGE_ATTN");
}

TEST_F(Online, PackedSequencesAreMeasuredToo) {
  testing::Plant packed = right();
  packed.can.packed = true;
  plant(Enum::FLASH_ATTN, packed);
  NormalTensors normal(1, kFloat32);
  const Tensor x = normal.next({1, 8, 2, 16});
  AttentionMetadataFields fields;
  Tensor offsets = empty({3}, kInt32);
  for (const auto& [at, value] : {std::pair{0, 0}, {1, 3}, {2, 8}}) {
    store_element(data_pointer(offsets), at, kInt32, value);
  }
  for (const char* key : {"cu_seqlens_q", "cu_seqlens_k"}) fields.extra.Set(key, offsets);
  for (const char* key : {"max_seqlen_q", "max_seqlen_k"}) fields.extra.Set(key, 5);
  const AttentionMetadata metadata(std::move(fields));
  EXPECT_GT(calls_in([&] { attention(x, x, x, {}, metadata); }), 3);
  EXPECT_EQ(calls_in([&] { attention(x, x, x, {}, metadata); }), 1);
}

}  // namespace
}  // namespace ditattn
