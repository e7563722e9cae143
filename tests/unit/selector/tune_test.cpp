// Measuring and what it changes: bounds, gains, every kind of problem, and what is refused.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "ditattn/launches.hpp"
#include "ditattn/observer.hpp"
#include "ditattn/tuner.hpp"
#include "tests/unit/packed_metadata.hpp"
#include "tests/unit/selector/planted_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;
using testing::kSmall;

class Tune : public testing::PlantedTest {};

// --- Choices

TEST_F(Tune, OnePercentIsNoGain) {
  plant(Enum::SAGE_ATTN, {});
  know(kSmall, {measured(Enum::SAGE_ATTN, 1.00, 1e-7), measured(Enum::FLASH_ATTN, 1.01, 1e-7)});
  EXPECT_EQ(computes(kSmall), "FLASH_ATTN");
  know(kSmall, {measured(Enum::SAGE_ATTN, 1.00, 1e-7), measured(Enum::FLASH_ATTN, 1.03, 1e-7)});
  EXPECT_EQ(computes(kSmall), "SAGE_ATTN");
}

TEST_F(Tune, TheErrorIsBounded) {
  plant(Enum::SAGE_ATTN, {.error = 0.03});
  know(kSmall,
       {measured(Enum::SAGE_ATTN, 1, 0.03), measured(Enum::TORCH_SDPA, 2, 1e-7), measured(Enum::FLASH_ATTN, 3, 1e-7)});
  EXPECT_EQ(computes(kSmall), "TORCH_SDPA") << "exact ones only";
  EXPECT_EQ(computes(kSmall, {.max_error = 0.05}), "SAGE_ATTN");
  EXPECT_EQ(computes(kSmall, {.max_error = 0.03}), "SAGE_ATTN");
  EXPECT_EQ(computes(kSmall, {.max_error = 0.029}), "TORCH_SDPA");
  EXPECT_EQ(computes(kSmall, {.max_error = 0}), "FLASH_ATTN") << "the order";
  EXPECT_EQ(explain(kSmall, "", AttentionConfig::from_json(R"({"default": {"backend": "auto", "max_error": 0}})")).why,
            "the platform's order: nothing was measured to be within 0.0e+00");
  const AttentionConfig config = AttentionConfig::from_json(
      R"({"per_role": {"cross": {"backend": "auto", "max_error": 0.05}}, "default": {"max_error": 1e-9}})");
  EXPECT_EQ(computes(kSmall, {.role = "cross", .config = config}), "SAGE_ATTN");
  EXPECT_EQ(computes(kSmall, {.max_error = 1e-9, .role = "cross", .config = config}), "SAGE_ATTN")
      << "the configuration goes first";
  EXPECT_EQ(computes(kSmall, {.role = "self", .config = config}), "FLASH_ATTN");
  EXPECT_EQ(computes(kSmall, {.max_error = 0.05, .role = "self", .config = config}), "FLASH_ATTN");
  EXPECT_EQ(tuned_member(kSmall, 0.05), Enum::SAGE_ATTN);
  EXPECT_EQ(tuned_member(kSmall), Enum::TORCH_SDPA);
  EXPECT_EQ(tuned_member(kSmall, 0), std::nullopt);
}

TEST_F(Tune, AWrongBoundIsAnError) {
  EXPECT_EQ(error_text<ValueError>([] { forward(kSmall, {.max_error = -0.1}); }),
            "max_error is -0.1, expected a number from 0 on.");
  error_text<ValueError>([] { forward(kSmall, {.max_error = std::nan("")}); });
  EXPECT_EQ(error_text<ValueError>([] { forward(kSmall, {.backend = "FLASH_ATTN", .max_error = 0.1}); }),
            "max_error bounds the choice of backend \"auto\", but the backend is FLASH_ATTN.");
}

TEST_F(Tune, TheChosenOneComputesTheSameBitsAsByName) {
  plant(Enum::SAGE_ATTN, {.error = 0.03});
  know(kSmall, {measured(Enum::SAGE_ATTN, 1, 0.03), measured(Enum::FLASH_ATTN, 3, 1e-7)});
  for (const auto& [bound, name] : {std::pair{0.05, "SAGE_ATTN"}, std::pair{1e-3, "FLASH_ATTN"}}) {
    const Tensor chosen = forward(kSmall, {.max_error = bound});
    const Tensor named = forward(kSmall, {.backend = name});
    EXPECT_EQ(std::memcmp(chosen.data_ptr(), named.data_ptr(), static_cast<std::size_t>(named.numel()) * 4), 0) << name;
  }
}

TEST_F(Tune, ANearProblemIsChosenForAlike) {
  plant(Enum::SAGE_ATTN, {});
  know(kSmall, {measured(Enum::SAGE_ATTN, 1, 1e-7), measured(Enum::FLASH_ATTN, 3, 1e-7)});
  Problem near = kSmall;
  near.seq_q = 19;
  EXPECT_EQ(computes(near), "SAGE_ATTN");
  near.seq_q = 20;
  EXPECT_EQ(computes(near), "FLASH_ATTN");
}

TEST_F(Tune, ChosenMembersMustTakeTheProblemNow) {
  testing::Plant none{};
  none.can.lse = false;
  plant(Enum::SAGE_ATTN, none);
  know(kSmall, {measured(Enum::SAGE_ATTN, 1, 1e-7), measured(Enum::FLASH_ATTN, 3, 1e-7)});
  Problem with_lse = kSmall;
  with_lse.lse = true;
  EXPECT_EQ(select_backend(kSmall).member, Enum::SAGE_ATTN);
  EXPECT_EQ(select_backend(with_lse).member, Enum::FLASH_ATTN);
  EXPECT_EQ(tuned_member(with_lse), Enum::FLASH_ATTN);
}

TEST_F(Tune, TheCausalRuleIsThatOfTheDefault) {
  testing::Plant top_left{};
  top_left.can.causal_alignment = CausalAlignment::top_left;
  plant(Enum::TORCH_SDPA, top_left);
  plant(Enum::SAGE_ATTN, top_left);
  Problem causal = kSmall;
  causal.causal = true;
  const TunedProblem tuned = quickly(causal);
  for (const Enum member : {Enum::TORCH_SDPA, Enum::SAGE_ATTN}) {
    expect_contains(of(tuned, member).reason, {"aligns causality otherwise than FLASH_ATTN (16 queries, 12 keys)"});
  }
  EXPECT_EQ(computes(causal), "FLASH_ATTN");
  causal.seq_kv = causal.seq_q;
  quickly(causal);
  EXPECT_NE(computes(causal), "FLASH_ATTN") << "both rules come to the same";
  // What was measured for a square problem is near to others, for which the rules differ.
  Problem near = causal;
  near.seq_q = 17;
  EXPECT_EQ(computes(near), "FLASH_ATTN");
}

TEST_F(Tune, OnlyThoseThatAreNamedAreMeasured) {
  plant(Enum::SAGE_ATTN, {});
  const TunedProblem tuned = quickly(kSmall, {.members = {Enum::SAGE_ATTN, Enum::TORCH_SDPA}});
  EXPECT_EQ(tuned.results.size(), 2U);
  EXPECT_EQ(calls(Enum::FLASH_ATTN), 0);
  EXPECT_EQ(computes(kSmall), "SAGE_ATTN");
  EXPECT_EQ(error_text<ImportError>([] { quickly(kSmall, {.members = {Enum::CUSTOM}}); }),
            "CUSTOM needs a device of its own");
}

TEST_F(Tune, WhatIsKnownOfOthersIsKept) {
  plant(Enum::SAGE_ATTN, {});
  know(kSmall, {measured(Enum::SAGE_ATTN, 1e-12, 0.5), measured(Enum::FLASH_ATTN, 1e-9, 1e-7),
                measured(Enum::TORCH_SDPA, 1e9, 1e-7)});
  const auto expect_kept = [](const TunedProblem& known) {
    ASSERT_EQ(known.results.size(), 3U);
    EXPECT_EQ(known.results[0].backend, "FLASH_ATTN");
    EXPECT_EQ(known.results[0].median_ms, 1e-9);
    EXPECT_EQ(known.results[1].backend, "SAGE_ATTN");
    EXPECT_LT(known.results[1].error, 1e-5) << "its own result is the new one";
    EXPECT_EQ(known.results[2].backend, "TORCH_SDPA");
    EXPECT_EQ(known.results[2].median_ms, 1e9);
  };
  expect_kept(quickly(kSmall, {.members = {Enum::SAGE_ATTN}}));
  EXPECT_EQ(calls(Enum::FLASH_ATTN) + calls(Enum::TORCH_SDPA), 0);
  EXPECT_EQ(computes(kSmall), "FLASH_ATTN");
  reload_tuned();
  ASSERT_EQ(tuned_problems(kCpu).size(), 1U);
  expect_kept(tuned_problems(kCpu)[0]);
  quickly(kSmall, {.members = {Enum::FLASH_ATTN}});
  EXPECT_EQ(of(*tuned(kSmall), Enum::TORCH_SDPA).median_ms, 1e9);
  EXPECT_LT(of(quickly(kSmall), Enum::TORCH_SDPA).median_ms, 1e9) << "all were asked";
}

TEST_F(Tune, WhatDoesNotHoldAnyMoreIsNotKnown) {
  TunedResult of_another_class = measured(Enum::FLASH_ATTN, 1e-9, 1e-7);
  of_another_class.class_path = "some.other.Class";
  know(kSmall, {of_another_class});
  const TunedProblem known = quickly(kSmall, {.members = {Enum::TORCH_SDPA}});
  ASSERT_EQ(known.results.size(), 1U);
  EXPECT_EQ(known.results[0].backend, "TORCH_SDPA");
}

// --- Kinds of problems

TEST_F(Tune, EveryKindOfProblemIsPosedAndIsExact) {
  double worst = 0;
  int problems = 0;
  for (const DLDataType dtype : {kFloat32, kFloat16, kBFloat16}) {
    for (const std::int64_t head_size : {40, 256}) {
      for (const MaskKind mask : {MaskKind::none, MaskKind::padding, MaskKind::boolean, MaskKind::additive}) {
        for (const int flags : {0, 1, 2, 3}) {
          const Problem problem{.batch = 2,
                                .num_heads = 4,
                                .num_kv_heads = (flags & 1) != 0 ? 2 : 4,
                                .seq_q = 24,
                                .seq_kv = 40,
                                .head_size = head_size,
                                .dtype = dtype,
                                .mask = mask,
                                .joint = (flags & 2) != 0};
          SCOPED_TRACE(fmt::format("{} {} {} {}", dtype_name(dtype), head_size, mask_kind_name(mask), flags));
          const TunedProblem tuned = tune(problem, {.members = {Enum::FLASH_ATTN}, .budget_ms = 0, .publish = false});
          EXPECT_TRUE(same_measurement(tuned.problem, problem));
          const TunedResult& result = of(tuned, Enum::FLASH_ATTN);
          EXPECT_EQ(result.reason, "");
          EXPECT_LE(result.error, exact_error(dtype));
          worst = std::max(worst, result.error / exact_error(dtype));
          EXPECT_TRUE(ditattn::tuned(problem));
          ++problems;
        }
      }
    }
  }
  std::cout << problems << " problems, the oracle's rounded output is at most " << worst
            << " of what counts as exact\n";
}

TEST_F(Tune, ShortSequencesArePosedAsAsked) {
  for (const std::int64_t keys : {2, 3, 5}) {
    const Problem padded{.seq_q = 4, .seq_kv = keys, .head_size = 8, .mask = MaskKind::padding};
    EXPECT_TRUE(same_measurement(quickly(padded).problem, padded)) << keys;
    const Problem joint{.seq_q = 16, .seq_kv = 8 * keys, .head_size = 8, .mask = MaskKind::padding, .joint = true};
    EXPECT_TRUE(same_measurement(quickly(joint).problem, joint)) << keys;
    const Problem masked{.seq_q = 4, .seq_kv = keys, .head_size = 8, .mask = MaskKind::boolean};
    EXPECT_TRUE(same_measurement(quickly(masked).problem, masked)) << keys;
  }
}

TEST_F(Tune, WhatHasNoTypicalTensorsIsAnError) {
  for (const auto& [problem, what] : {std::pair{Problem{.packed = true}, "packed sequences"},
                                      std::pair{Problem{.spans = true}, "spans of full attention"}}) {
    EXPECT_EQ(error_text<NotImplementedError>([&, &problem = problem] { tune(problem); }),
              std::string("No typical tensors are known for ") + what +
                  ": measure real ones, by tune_call or `ditattn tune --input`.");
  }
}

TEST_F(Tune, EmptyAndWrongTensorsAreErrors) {
  for (const Problem& problem : {Problem{.seq_q = 0}, Problem{.batch = 0}}) {
    expect_contains(error_text<ValueError>([&] { tune(problem); }), {"has no elements: there is nothing to measure."});
  }
  for (const Problem& problem : {Problem{.seq_q = -1}, Problem{.num_heads = 0}, Problem{.num_kv_heads = 0},
                                 Problem{.head_size = 0}, Problem{.num_heads = 3, .num_kv_heads = 2}}) {
    error_text<ValueError>([&] { tune(problem); });
  }
  error_text<MemoryError>([&] { tune({.batch = 1 << 20, .seq_q = 1 << 20, .head_size = 256}); });
  const Tensor good = testing::counting({1, 3, 2, 8});
  const Tensor flat = testing::counting({3, 16});
  expect_contains(error_text<ValueError>([&] { tune_call({.num_heads = 2, .head_size = 8}, flat, good, good); }),
                  {"query must have 4 dimensions"});
  error_text<ValueError>([&] { tune_call({.num_heads = 2, .head_size = 8}, {}, good, good); });
  const Tensor other = testing::counting({1, 3, 2, 9});
  error_text<ValueError>([&] { tune_call({.num_heads = 2, .head_size = 8}, good, other, other); });
  error_text<ValueError>([&] { tune_call({.num_heads = 4, .head_size = 8}, good, good, good); });
  EXPECT_TRUE(tuned_problems(kCpu).empty());
  EXPECT_FALSE(std::filesystem::exists(tune_cache_file(kCpu)));
}

TEST_F(Tune, RealTensorsMayBePacked) {
  testing::Plant packed = right();
  packed.can.packed = true;
  plant(Enum::FLASH_ATTN, packed);
  AttentionMetadataFields fields;
  fields.extra = testing::packed({0, 3, 8}, {0, 2, 6});
  NormalTensors normal(1, kFloat32);
  const Tensor query = normal.next({1, 8, 2, 16});
  const Tensor key = normal.next({1, 6, 2, 16});
  const TunedProblem tuned = tune_call({.num_heads = 2, .head_size = 16}, query, key, key,
                                       AttentionMetadata(std::move(fields)), {.budget_ms = 0});
  EXPECT_TRUE(tuned.problem.packed);
  EXPECT_LT(of(tuned, Enum::FLASH_ATTN).error, 1e-5);
}

TEST_F(Tune, NeitherObserversNorCountersAreTold) {
  struct Witness final : ForwardObserver {
    void before(const ForwardEvent& /*event*/) override { ++told; }
    void after(const ForwardEvent& /*event*/) override { ++told; }
    int told = 0;
  };
  const auto witness = std::make_shared<Witness>();
  const ForwardObservation observation(witness);
  reset_launch_counts();
  quickly(kSmall);
  EXPECT_GT(calls(Enum::FLASH_ATTN), 0);
  EXPECT_EQ(witness->told, 0);
  EXPECT_TRUE(launch_counts().empty());
  forward(kSmall);
  EXPECT_EQ(witness->told, 2);
  EXPECT_EQ(launch_counts().size(), 1U);
}

TEST_F(Tune, StepsAreReported) {
  std::vector<std::string> steps;
  quickly(kSmall, {.report = [&](std::string_view step) { steps.emplace_back(step); }});
  ASSERT_GT(steps.size(), 4U);
  EXPECT_EQ(steps[0], "FLASH_ATTN warming up");
  EXPECT_EQ(steps[1], "TORCH_SDPA warming up");
  EXPECT_NE(steps[2].find(" round 1/"), std::string::npos) << steps[2];
}

}  // namespace
}  // namespace ditattn
