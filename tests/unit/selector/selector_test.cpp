// Which backend is used where nobody names one: DIFFUSION_ATTENTION_BACKEND, then the platform's ordered candidates.

#include "ditattn/selector.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;
using testing::ScopedEnvironment;
using testing::ToyBackend;

constexpr const char* kVariable = "DIFFUSION_ATTENTION_BACKEND";

// FLASH_ATTN takes head sizes up to 64 only, TORCH_SDPA any; neither depends on what is installed.
class Selector : public testing::RegistryTest {
 protected:
  void SetUp() override {
    Capabilities small = testing::toy_capabilities();
    small.head_sizes.max = 64;
    use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>("SMALL", 1, small));
    use(Enum::TORCH_SDPA, std::make_shared<ToyBackend>("ANY"));
  }
};

struct Unavailable : ToyBackend {
  Unavailable() : ToyBackend("UNAVAILABLE") {}
  void validate_available() const override { throw ImportError("UNAVAILABLE needs a device of its own"); }
};

TEST_F(Selector, CpuCandidatesInOrder) {
  EXPECT_EQ(platform_candidates("cpu"), (std::vector<Enum>{Enum::FLASH_ATTN, Enum::TORCH_SDPA}));
  expect_contains(error_text<ValueError>([] { platform_candidates("abacus"); }),
                  {"Unknown device 'abacus'. Valid devices are: cpu, cuda"});
  error_text<ImportError>([] { platform_candidates("cuda"); });
}

TEST_F(Selector, PlatformDefaultIsTheFirstThatTakesTheProblem) {
  const ScopedEnvironment unset(kVariable, nullptr);
  const Selection small = select_backend({.head_size = 64});
  EXPECT_EQ(small.member, Enum::FLASH_ATTN);
  EXPECT_EQ(small.backend->get_name(), "SMALL");
  EXPECT_EQ(small.source, "platform default");
  EXPECT_FALSE(small.is_explicit);
  EXPECT_EQ(select_backend({.head_size = 72}).member, Enum::TORCH_SDPA);
}

TEST_F(Selector, PassingOverIsLoggedWithItsReason) {
  const ScopedEnvironment unset(kVariable, nullptr);
  const testing::LogRecorder log;
  const std::string role = testing::unused("selector_test.role");
  const std::string head_size = testing::unused("73");
  select_backend({.head_size = std::stoi(head_size)}, role);
  EXPECT_EQ(log.of(LogLevel::info),
            (std::vector<std::string>{
                "Platform default passes over FLASH_ATTN: does not support head_size=" + head_size +
                    ". Supported head sizes: 1 to 64.",
                "Resolved diffusion attention backend 'TORCH_SDPA' for role='" + role + "' via platform default"}));
}

TEST_F(Selector, UnavailableOrBrokenCandidatesArePassedOver) {
  const ScopedEnvironment unset(kVariable, nullptr);
  use(Enum::FLASH_ATTN, std::make_shared<Unavailable>());
  EXPECT_EQ(select_backend({}).member, Enum::TORCH_SDPA);
  register_diffusion_backend(Enum::FLASH_ATTN, "selector_test.nowhere.Backend");
  EXPECT_EQ(select_backend({}).member, Enum::TORCH_SDPA);
}

TEST_F(Selector, NothingThatTakesItListsEveryReason) {
  const ScopedEnvironment unset(kVariable, nullptr);
  use(Enum::TORCH_SDPA, std::make_shared<Unavailable>());
  expect_contains(
      error_text<ValueError>([] { select_backend({.head_size = 72}); }),
      {"No backend of the platform's defaults for device 'cpu' takes this problem:\n",
       "\n  - FLASH_ATTN: does not support head_size=72.", "\n  - TORCH_SDPA: UNAVAILABLE needs a device of its own"});
}

TEST_F(Selector, EnvironmentWinsInAnyCase) {
  for (const char* name : {"TORCH_SDPA", "torch_sdpa", "Torch_Sdpa"}) {
    const ScopedEnvironment variable(kVariable, name);
    const Selection selection = select_backend({.head_size = 64});
    EXPECT_EQ(selection.member, Enum::TORCH_SDPA) << name;
    EXPECT_EQ(selection.source, "attention_config.default (DIFFUSION_ATTENTION_BACKEND)");
    EXPECT_TRUE(selection.is_explicit);
  }
}

TEST_F(Selector, AutoAndEmptyMeanNotSet) {
  for (const char* name : {"auto", "AUTO", "Auto", ""}) {
    const ScopedEnvironment variable(kVariable, name);
    EXPECT_EQ(select_backend({.head_size = 64}).member, Enum::FLASH_ATTN) << name;
  }
}

TEST_F(Selector, UnknownNameIsShownInUpperCase) {
  const ScopedEnvironment variable(kVariable, "nope");
  expect_contains(error_text<UnknownBackendError>([] { select_backend({}); }),
                  {"Unknown diffusion attention backend: 'NOPE'. Valid options are: FLASH_ATTN, TORCH_SDPA, SAGE_ATTN, "
                   "SAGE_ATTN_3, CUDNN_ATTN, FLASHINFER_ATTN, CUSTOM"});
}

TEST_F(Selector, ExplicitChoiceIsNeverReplaced) {
  const ScopedEnvironment variable(kVariable, "FLASH_ATTN");
  expect_contains(error_text<ValueError>([] { select_backend({.head_size = 72}); }),
                  {"FLASH_ATTN was explicitly selected but head_size=72 is unsupported."});
  use(Enum::FLASH_ATTN, std::make_shared<Unavailable>());
  EXPECT_EQ(error_text<ImportError>([] { select_backend({}); }), "UNAVAILABLE needs a device of its own");
  register_diffusion_backend(Enum::FLASH_ATTN, "selector_test.nowhere.Backend");
  error_text<ImportError>([] { select_backend({}); });
}

// --- explain

const MemberVerdict& answer_of(const Explanation& explanation, Enum member) {
  return *std::ranges::find(explanation.members, member, &MemberVerdict::member);
}

TEST_F(Selector, ExplanationHasCandidatesInOrderAndThenAllOthers) {
  const ScopedEnvironment unset(kVariable, nullptr);
  const Explanation small = explain({.head_size = 64});
  EXPECT_EQ(small.source, "platform default");
  EXPECT_FALSE(small.is_explicit);
  EXPECT_EQ(small.chosen, Enum::FLASH_ATTN);
  ASSERT_EQ(small.members.size(), Enum::members().size());
  EXPECT_EQ(small.members[0].member, Enum::FLASH_ATTN);
  EXPECT_EQ(small.members[1].member, Enum::TORCH_SDPA);
  for (std::size_t i = 0; i < small.members.size(); ++i) EXPECT_EQ(small.members[i].is_candidate, i < 2) << i;
  EXPECT_TRUE(small.members[1].verdict) << "would do, but is not reached";

  const Explanation large = explain({.head_size = 72});
  EXPECT_EQ(large.chosen, Enum::TORCH_SDPA);
  expect_contains(large.members[0].verdict.text(), {"head_size=72", "1 to 64"});
}

TEST_F(Selector, ExplanationNeverThrowsForABackendAndChoosesAsSelectBackend) {
  const ScopedEnvironment unset(kVariable, nullptr);
  use(Enum::FLASH_ATTN, std::make_shared<Unavailable>());
  register_diffusion_backend(Enum::SAGE_ATTN, "selector_test.nowhere.Backend");
  const Explanation explanation = explain({.head_size = 64});
  EXPECT_EQ(explanation.chosen, select_backend({.head_size = 64}).member);
  EXPECT_EQ(explanation.members[0].verdict.text(), "UNAVAILABLE needs a device of its own");
  expect_contains(answer_of(explanation, Enum::SAGE_ATTN).verdict.text(), {"selector_test.nowhere.Backend"});
  EXPECT_EQ(answer_of(explanation, Enum::SAGE_ATTN).backend, nullptr);
  expect_contains(answer_of(explanation, Enum::CUSTOM).verdict.text(), {"must be registered before use"});

  use(Enum::TORCH_SDPA, std::make_shared<Unavailable>());
  EXPECT_FALSE(explain({}).chosen);
}

TEST_F(Selector, ExplanationOfAnExplicitChoiceHasOneCandidate) {
  const ScopedEnvironment variable(kVariable, "flash_attn");
  const Explanation explanation = explain({.head_size = 72});
  EXPECT_TRUE(explanation.is_explicit);
  EXPECT_EQ(explanation.source, "attention_config.default (DIFFUSION_ATTENTION_BACKEND)");
  EXPECT_FALSE(explanation.chosen) << "TORCH_SDPA would do, but nothing replaces an explicit choice";
  EXPECT_TRUE(answer_of(explanation, Enum::TORCH_SDPA).verdict);
  EXPECT_EQ(std::ranges::count(explanation.members, true, &MemberVerdict::is_candidate), 1);

  const AttentionConfig config = AttentionConfig::from_json(R"({"per_role": {"cross": "TORCH_SDPA"}})");
  EXPECT_EQ(explain({}, "cross", config).source, "attention_config.per_role['cross']");
  EXPECT_EQ(explain({}, "cross", config).chosen, Enum::TORCH_SDPA);
  error_text<UnknownBackendError>([&] { explain({}, "", AttentionConfig::from_json(R"({"default": "NOPE"})")); });
}

TEST_F(Selector, ExplanationNamesTheCausalRuleThatDiffers) {
  const ScopedEnvironment unset(kVariable, nullptr);
  Capabilities other = testing::toy_capabilities();
  other.causal_alignment = CausalAlignment::top_left;
  use(Enum::TORCH_SDPA, std::make_shared<ToyBackend>("OTHER", 1, other));
  Capabilities first = testing::toy_capabilities();
  first.head_sizes.max = 64;
  first.lse = false;
  use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>("FIRST", 1, first));
  const Problem problem{.seq_q = 3, .seq_kv = 5, .head_size = 64, .causal = true, .lse = true};
  const Explanation explanation = explain(problem);
  EXPECT_FALSE(explanation.members[0].verdict);
  expect_contains(explanation.members[1].verdict.text(), {"TORCH_SDPA aligns causality otherwise than FLASH_ATTN"});
  EXPECT_FALSE(explanation.chosen);
  error_text<ValueError>([&] { select_backend(problem); });
  EXPECT_EQ(explain({.seq_q = 5, .seq_kv = 5, .head_size = 64, .causal = true, .lse = true}).chosen, Enum::TORCH_SDPA);
  // Where the first lacks the head size, the next is the default, with its own rule.
  const Problem large{.seq_q = 3, .seq_kv = 5, .head_size = 72, .causal = true};
  EXPECT_EQ(explain(large).chosen, Enum::TORCH_SDPA);
  EXPECT_EQ(select_backend(large).member, Enum::TORCH_SDPA);
}

TEST_F(Selector, ExplicitCustomMustBeRegistered) {
  const ScopedEnvironment variable(kVariable, "custom");
  error_text<NotRegisteredError>([] { select_backend({}); });
  register_diffusion_backend<ToyBackend>(Enum::CUSTOM);
  EXPECT_EQ(select_backend({}).backend->get_name(), "TOY");
}

}  // namespace
}  // namespace ditattn
