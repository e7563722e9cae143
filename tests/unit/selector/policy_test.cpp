// on_unusable, allowed and max_error: what a role's choice may be replaced by, and what is told of it.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/unit/selector/planted_fixture.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;
using testing::kSmall;
using testing::LogRecorder;
using testing::Plant;
using testing::ScopedEnvironment;

// SAGE_ATTN is what roles ask for; it has head sizes to 64 and no log-sum-exp.
class Policy : public testing::PlantedTest {
 protected:
  void SetUp() override {
    PlantedTest::SetUp();
    plant(Enum::SAGE_ATTN, picky());
  }
  static Plant picky() {
    Plant plant{};
    plant.can.head_sizes.max = 64;
    plant.can.lse = false;
    return plant;
  }
  static AttentionConfig config(const std::string& policy) {
    return AttentionConfig::from_json(R"({"per_role": {"self": {"backend": "sage_attn")" + policy + "}}}");
  }
  // The member whose class a role gets.
  static Enum chosen(const AttentionConfig& config, std::int64_t head_size = 16, const std::string& role = "self") {
    return get_attn_backend_for_role(role, head_size, config).member;
  }
  static void forward_with_lse(const AttentionImpl& layer) {
    NormalTensors normal(1, kFloat32);
    const Tensor x = normal.next({1, 4, 1, 16});
    layer.forward(x, x, x, {}, {.out = {}, .lse = empty({1, 1, 4}, kFloat32)});
  }
};

TEST_F(Policy, ErrorIsTheDefaultOfANamedChoice) {
  for (const char* policy : {"", R"(, "on_unusable": "error")", R"(, "on_unusable": null)"}) {
    const AttentionConfig strict = config(policy);
    plant(Enum::SAGE_ATTN, picky());
    EXPECT_EQ(chosen(strict), Enum::SAGE_ATTN);
    expect_contains(error_text<ValueError>([&] { chosen(strict, 72); }),
                    {"SAGE_ATTN was explicitly selected but head_size=72 is unsupported."});
    const auto layer = get_attn_backend_for_role("self", 16, strict).backend->make({.head_size = 16});
    expect_contains(error_text<ValueError>([&] { forward_with_lse(*layer); }), {"log-sum-exp"});
    plant(Enum::SAGE_ATTN, {.is_unavailable = true});
    EXPECT_EQ(error_text<ImportError>([&] { chosen(strict); }), "SAGE_ATTN needs a device of its own");
  }
}

// One that cannot be had here, or lacks the head size, is replaced when the layer's backend is chosen.
TEST_F(Policy, WhatCannotBeHadIsReplacedWithTheReason) {
  for (const auto& [policy, level] : {std::pair{"warn", LogLevel::warning}, std::pair{"allow", LogLevel::info}}) {
    const std::string role = testing::unused(policy);
    const AttentionConfig lenient = AttentionConfig::from_json(
        fmt::format(R"({{"per_role": {{"{}": {{"backend": "SAGE_ATTN", "on_unusable": "{}"}}}}}})", role, policy));
    plant(Enum::SAGE_ATTN, picky());
    EXPECT_EQ(chosen(lenient, 16, role), Enum::SAGE_ATTN);
    const LogRecorder log;
    for (int layer = 0; layer < 3; ++layer) EXPECT_EQ(chosen(lenient, 73, role), Enum::FLASH_ATTN);
    plant(Enum::SAGE_ATTN, {.is_unavailable = true});
    for (int layer = 0; layer < 3; ++layer) EXPECT_EQ(chosen(lenient, 16, role), Enum::FLASH_ATTN);
    std::vector<std::string> moves;
    for (const std::string& text : log.of(level)) {
      if (text.find("The choice of") == 0) moves.push_back(text);
    }
    const std::string move = fmt::format("The choice of SAGE_ATTN moves on to FLASH_ATTN for role='{}': ", role);
    EXPECT_EQ(moves, (std::vector<std::string>{
                         move + "SAGE_ATTN: does not support head_size=73. Supported head sizes: 1 to 64.",
                         move + "SAGE_ATTN: SAGE_ATTN needs a device of its own"}));
    EXPECT_TRUE(get_attn_backend_for_role(role, 16, lenient).is_explicit);
  }
}

// A problem that is refused is known at the call only.
TEST_F(Policy, AProblemThatIsRefusedMovesOnOncePerLayer) {
  for (const auto& [policy, level] : {std::pair{"warn", LogLevel::warning}, std::pair{"allow", LogLevel::info}}) {
    const AttentionConfig lenient = config(fmt::format(R"(, "on_unusable": "{}")", policy));
    const BackendClass backend = get_attn_backend_for_role("self", 16, lenient).backend;
    EXPECT_EQ(backend->get_name(), "SAGE_ATTN");
    const LogRecorder log;
    for (const char* prefix : {"blocks.0", "blocks.1"}) {
      const auto layer = backend->make({.head_size = 16, .prefix = prefix});
      EXPECT_EQ(computing([&] { forward_with_lse(*layer); }).count("FLASH_ATTN"), 1U);
      for (int call = 0; call < 3; ++call) forward_with_lse(*layer);
    }
    EXPECT_EQ(log.of(level), (std::vector<std::string>{"The choice of SAGE_ATTN moves on to FLASH_ATTN in 'blocks.0': "
                                                       "SAGE_ATTN does not return the log-sum-exp.",
                                                       "The choice of SAGE_ATTN moves on to FLASH_ATTN in 'blocks.1': "
                                                       "SAGE_ATTN does not return the log-sum-exp."}))
        << policy;
  }
}

TEST_F(Policy, TheAllowedAreTriedInTheirOrderAndNobodyElse) {
  plant(Enum::CUSTOM, right());
  const AttentionConfig two = config(R"(, "on_unusable": "allow", "allowed": ["custom", "TORCH_SDPA"])");
  const BackendClass backend = get_attn_backend_for_role("self", 16, two).backend;
  const auto layer = backend->make({.head_size = 16});
  EXPECT_EQ(computing([&] { forward_with_lse(*layer); }).begin()->first, "CUSTOM");
  plant(Enum::CUSTOM, picky());
  EXPECT_EQ(
      computing([&] { forward_with_lse(*get_attn_backend_for_role("self", 16, two).backend->make({.head_size = 16})); })
          .begin()
          ->first,
      "TORCH_SDPA");
  plant(Enum::TORCH_SDPA, {.refuses = "TORCH_SDPA is planted to refuse"});
  const Problem with_lse{.head_size = 16, .lse = true};
  expect_contains(error_text<ValueError>([&] { select_backend(with_lse, "self", two); }),
                  {"No backend of what was chosen for device 'cpu' takes this problem:\n",
                   "\n  - SAGE_ATTN does not return the log-sum-exp.", "\n  - CUSTOM does not return the log-sum-exp.",
                   "\n  - TORCH_SDPA is planted to refuse"});
  EXPECT_FALSE(explain(with_lse, "self", two).chosen) << "FLASH_ATTN would do, but is not allowed";
  EXPECT_EQ(select_backend({.head_size = 72}, "cross", two).member, Enum::FLASH_ATTN) << "another role";
}

TEST_F(Policy, NobodyLeftListsOneReasonPerMember) {
  plant(Enum::SAGE_ATTN, {.is_unavailable = true});
  plant(Enum::TORCH_SDPA, {.refuses = "TORCH_SDPA is planted to refuse"});
  plant(Enum::FLASH_ATTN, picky());
  const AttentionConfig lenient = config(R"(, "on_unusable": "warn")");
  const Problem with_lse{.head_size = 16, .lse = true};
  const std::vector<std::string> reasons{"SAGE_ATTN needs a device of its own",
                                         "FLASH_ATTN does not return the log-sum-exp.",
                                         "TORCH_SDPA is planted to refuse"};
  expect_contains(error_text<ValueError>([&] { select_backend(with_lse, "self", lenient); }), reasons);
  const auto layer = get_attn_backend_for_role("self", 16, lenient).backend->make({.head_size = 16});
  expect_contains(error_text<ValueError>([&] { forward_with_lse(*layer); }), reasons);
  plant(Enum::TORCH_SDPA, {.is_unavailable = true});
  plant(Enum::FLASH_ATTN, {.is_unavailable = true});
  expect_contains(error_text<ValueError>([&] { chosen(lenient); }),
                  {"SAGE_ATTN needs a device", "FLASH_ATTN needs a device", "TORCH_SDPA needs a device"});
}

TEST_F(Policy, NamesAreCheckedWhenTheyAreUsed) {
  for (const char* policy : {R"(, "on_unusable": "allow", "allowed": ["nope"])"}) {
    expect_contains(error_text<UnknownBackendError>([&] { chosen(config(policy)); }),
                    {"Unknown diffusion attention backend: 'NOPE'"});
  }
  expect_contains(error_text<UnknownBackendError>([&] {
                    chosen(AttentionConfig::from_json(R"({"default": {"backend": "auto", "allowed": ["nope"]}})"));
                  }),
                  {"'NOPE'"});
}

TEST_F(Policy, ARolesCategoryHasItsPolicy) {
  const AttentionConfig by_category =
      AttentionConfig::from_json(R"({"per_role": {"video": {"backend": "SAGE_ATTN", "on_unusable": "allow"}}})");
  const Selection selection = get_attn_backend_for_role("ltx2.audio_to_video", 72, by_category, "video");
  EXPECT_EQ(selection.member, Enum::FLASH_ATTN);
  EXPECT_EQ(selection.source, "attention_config.per_role['video'] (role_category fallback)");
}

// --- The automatic choice, with bounds

TEST_F(Policy, AutomaticAmongTheAllowed) {
  const auto among = [](const std::string& allowed) {
    return AttentionConfig::from_json(R"({"default": {"backend": "auto", "allowed": [)" + allowed + "]}}");
  };
  EXPECT_EQ(chosen(among(R"("TORCH_SDPA")")), Enum::TORCH_SDPA);
  EXPECT_EQ(chosen(among(R"("TORCH_SDPA", "flash_attn")")), Enum::FLASH_ATTN) << "the platform's order";
  EXPECT_EQ(chosen(among(R"("SAGE_ATTN")")), Enum::SAGE_ATTN) << "nobody of the platform's order";
  know(kSmall,
       {measured(Enum::SAGE_ATTN, 1, 1e-7), measured(Enum::TORCH_SDPA, 2, 1e-7), measured(Enum::FLASH_ATTN, 3, 1e-7)});
  EXPECT_EQ(computes(kSmall, {.config = among(R"("TORCH_SDPA", "FLASH_ATTN")")}), "TORCH_SDPA");
  EXPECT_EQ(computes(kSmall, {.config = among(R"("FLASH_ATTN")")}), "FLASH_ATTN");
  EXPECT_EQ(computes(kSmall, {.config = among(R"("FLASH_ATTN", "SAGE_ATTN")")}), "SAGE_ATTN");
  expect_contains(error_text<ValueError>([&] { chosen(among(R"("SAGE_ATTN")"), 72); }),
                  {"SAGE_ATTN: does not support"});
}

TEST_F(Policy, AutomaticWithErrorIsTheFirstAlone) {
  const AttentionConfig first = AttentionConfig::from_json(R"({"default": {"on_unusable": "error"}})");
  know(kSmall, {measured(Enum::TORCH_SDPA, 1, 1e-7), measured(Enum::FLASH_ATTN, 3, 1e-7)});
  EXPECT_EQ(computes(kSmall, {.config = first}), "FLASH_ATTN") << "whatever was measured";
  plant(Enum::FLASH_ATTN, {.refuses = "FLASH_ATTN is planted to refuse"});
  expect_contains(error_text<ValueError>([&] { select_backend(kSmall, "", first); }), {"planted to refuse"});
  const Explanation explanation = explain(kSmall, "", first);
  EXPECT_FALSE(explanation.chosen);
  EXPECT_EQ(std::ranges::count(explanation.members, true, &MemberVerdict::is_candidate), 1);
  EXPECT_EQ(computes(kSmall), "TORCH_SDPA");
}

TEST_F(Policy, TheVariableGoesBeforeAnAutomaticDefaultOnly) {
  const ScopedEnvironment variable("DIFFUSION_ATTENTION_BACKEND", "torch_sdpa");
  const AttentionConfig bounded = AttentionConfig::from_json(
      R"({"default": {"backend": "auto", "max_error": 0.05}, "per_role": {"self": {"backend": "auto", "max_error": 0.1}}})");
  EXPECT_EQ(get_attn_backend_for_role("cross", 16, bounded).source,
            "attention_config.default (DIFFUSION_ATTENTION_BACKEND)");
  EXPECT_EQ(chosen(bounded, 16, "cross"), Enum::TORCH_SDPA);
  EXPECT_EQ(get_attn_backend_for_role("self", 16, bounded).source, "attention_config.per_role['self']");
  EXPECT_EQ(chosen(bounded, 16, "self"), Enum::FLASH_ATTN);
  EXPECT_FALSE(get_attn_backend_for_role("self", 16, bounded).is_explicit);
}

// --- JSON

TEST(PolicyJson, Forms) {
  const AttentionConfig config = AttentionConfig::from_json(R"({
      "default": {"backend": "auto", "max_error": 0},
      "per_role": {"self": {"backend": "sage_attn", "on_unusable": "warn", "allowed": ["flash_attn", "Torch_SDPA"]},
                   "cross": {"max_error": 0.05, "allowed": ["SAGE_ATTN"], "on_unusable": "error"},
                   "plain": {"backend": "auto"},
                   "nulls": {"backend": null, "on_unusable": null, "allowed": null, "max_error": null},
                   "ltx2": {"video": {"backend": "sage_attn", "on_unusable": "allow", "allowed": null}}}})");
  EXPECT_TRUE(config.default_spec.value().is_automatic());
  EXPECT_EQ(config.default_spec->max_error, 0);
  const AttentionSpec& self = config.per_role.at("self");
  EXPECT_EQ(self.backend, "SAGE_ATTN");
  EXPECT_EQ(self.on_unusable, OnUnusable::warn);
  EXPECT_EQ(self.allowed, (std::vector<std::string>{"FLASH_ATTN", "TORCH_SDPA"}));
  EXPECT_FALSE(self.max_error);
  const AttentionSpec& cross = config.per_role.at("cross");
  EXPECT_TRUE(cross.is_automatic());
  EXPECT_EQ(cross.max_error, 0.05);
  EXPECT_EQ(cross.on_unusable, OnUnusable::error);
  EXPECT_FALSE(config.per_role.contains("plain"));
  EXPECT_FALSE(config.per_role.contains("nulls"));
  EXPECT_EQ(config.per_role.at("ltx2.video").on_unusable, OnUnusable::allow);
}

TEST(PolicyJson, WrongForms) {
  const std::pair<const char*, const char*> wrong[] = {
      {R"("backend": "sage_attn", "on_unusable": "never")",
       "AttentionSpec.on_unusable is \"never\". Valid values are: error, warn, allow"},
      {R"("backend": "sage_attn", "on_unusable": "WARN")", "AttentionSpec.on_unusable is \"WARN\"."},
      {R"("backend": "sage_attn", "on_unusable": true)", "AttentionSpec.on_unusable is true."},
      {R"("backend": "sage_attn", "on_unusable": ["warn"])", R"(AttentionSpec.on_unusable is ["warn"].)"},
      {R"("backend": "sage_attn", "on_unusable": "warn", "allowed": [])",
       "AttentionSpec.allowed is [], expected a list of backends' names. Without it, the platform's order is meant."},
      {R"("backend": "sage_attn", "on_unusable": "warn", "allowed": "flash_attn")",
       "AttentionSpec.allowed is \"flash_attn\", expected a list"},
      {R"("backend": "sage_attn", "on_unusable": "warn", "allowed": {"a": 1})", "expected a list"},
      {R"("backend": "sage_attn", "on_unusable": "warn", "allowed": [1])",
       "Expected str for AttentionSpec.allowed, got int"},
      {R"("backend": "sage_attn", "on_unusable": "warn", "allowed": ["auto"])",
       "AttentionSpec.allowed has no backend in one of its places. Name backends."},
      {R"("backend": "sage_attn", "on_unusable": "warn", "allowed": ["flash_attn", null])", "has no backend in one"},
      {R"("backend": "sage_attn", "on_unusable": "warn", "allowed": [""])",
       "AttentionSpec.allowed is an empty string."},
      {R"("backend": "sage_attn", "allowed": ["flash_attn"])",
       "AttentionSpec.allowed is given, but SAGE_ATTN is never replaced. Set on_unusable to \"warn\" or \"allow\"."},
      {R"("backend": "sage_attn", "on_unusable": "error", "allowed": ["flash_attn"])", "SAGE_ATTN is never replaced."},
      {R"("backend": "sage_attn", "max_error": 0.1)",
       "AttentionSpec.max_error is for backend \"auto\", but backend=SAGE_ATTN"},
      {R"("backend": "auto", "max_error": -0.1)", "AttentionSpec.max_error is -0.1, expected a number from 0 on."},
      {R"("backend": "auto", "max_error": "0.1")", "AttentionSpec.max_error is \"0.1\", expected a number"},
      {R"("backend": "auto", "max_error": true)", "AttentionSpec.max_error is true, expected a number"},
      {R"("max_error": 0.1, "backend_kwargs": {"a": 1})",
       "the per_role entry for role 'self' has options but no backend that they are for. Name one in 'backend'."},
      {R"("on_unusable": "warn", "self": "flash_attn")", "cannot mix"},
      {R"("backend": "sage_attn", "on_unuseable": "warn")", "cannot mix"},
      {R"("max_error": 1e999)", "is not JSON"}};
  for (const auto& [spec, message] : wrong) {
    const std::string text = fmt::format(R"({{"per_role": {{"self": {{{}}}}}}})", spec);
    expect_contains(error_text<ConfigError>([&] { AttentionConfig::from_json(text); }), {message});
  }
  expect_contains(error_text<ConfigError>([] {
                    AttentionConfig::from_json(R"({"default": {"backend": "auto", "on_unuseable": "warn"}})");
                  }),
                  {"Unknown key 'on_unuseable' in AttentionConfig.default. Valid keys are: backend, backend_kwargs, "
                   "on_unusable, allowed, max_error"});
}

}  // namespace
}  // namespace ditattn
