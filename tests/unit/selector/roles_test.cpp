// get_attn_backend_for_role: precedence, sources, and the platform default as a class that moves on.

#include <gtest/gtest.h>

#include "ditattn/selector.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;
using testing::LogRecorder;
using testing::ScopedEnvironment;
using testing::toy_answer;
using testing::ToyBackend;
using testing::unused;

constexpr const char* kVariable = "DIFFUSION_ATTENTION_BACKEND";

// FLASH_ATTN answers 3 and has head sizes to 64 and no log-sum-exp; TORCH_SDPA answers 6 and SAGE_ATTN 9.
class Roles : public testing::RegistryTest {
 protected:
  void SetUp() override {
    Capabilities small = testing::toy_capabilities();
    small.head_sizes.max = 64;
    small.lse = false;
    use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>("SMALL", 1, small));
    use(Enum::TORCH_SDPA, std::make_shared<ToyBackend>("ANY", 2));
    use(Enum::SAGE_ATTN, std::make_shared<ToyBackend>("SAGE", 3));
  }
  static void use(Enum member, BackendClass backend) {
    const std::string path = "roles_test." + member.name() + ".Backend";
    register_backend_class(path, std::move(backend));
    register_diffusion_backend(member, path);
  }
  static AttentionConfig config() {
    return AttentionConfig::from_json(R"({"default": "flash_attn",
        "per_role": {"self": {"backend": "torch_sdpa", "backend_kwargs": {"known": 1}}, "video": "sage_attn"}})");
  }

  const ScopedEnvironment unset_{kVariable, nullptr};
};

TEST_F(Roles, RoleGoesFirst) {
  const Selection selection = get_attn_backend_for_role("self", 64, config(), "video");
  EXPECT_EQ(selection.member, Enum::TORCH_SDPA);
  EXPECT_EQ(selection.backend, Enum::TORCH_SDPA.get_class());
  EXPECT_EQ(selection.source, "attention_config.per_role['self']");
  EXPECT_TRUE(selection.is_explicit);
  ASSERT_TRUE(selection.spec);
  EXPECT_EQ(selection.backend_kwargs().size(), 1U);
}

TEST_F(Roles, ThenItsCategory) {
  const Selection selection = get_attn_backend_for_role("ltx2.audio_to_video", 64, config(), "video");
  EXPECT_EQ(selection.member, Enum::SAGE_ATTN);
  EXPECT_EQ(selection.source, "attention_config.per_role['video'] (role_category fallback)");
}

TEST_F(Roles, ThenTheDefault) {
  const Selection selection = get_attn_backend_for_role("cross", 64, config(), "text");
  EXPECT_EQ(selection.member, Enum::FLASH_ATTN);
  EXPECT_EQ(selection.source, "attention_config.default");
  EXPECT_TRUE(selection.is_explicit);
}

TEST_F(Roles, EnvironmentFillsTheDefaultOnly) {
  const ScopedEnvironment variable(kVariable, "sage_attn");
  EXPECT_EQ(get_attn_backend_for_role("cross", 64, config()).member, Enum::FLASH_ATTN);
  EXPECT_EQ(get_attn_backend_for_role("self", 64, config()).member, Enum::TORCH_SDPA);
  const AttentionConfig without =
      AttentionConfig::from_json(R"({"default": "auto", "per_role": {"self": "TORCH_SDPA"}})");
  const Selection filled = get_attn_backend_for_role("cross", 64, without);
  EXPECT_EQ(filled.member, Enum::SAGE_ATTN);
  EXPECT_EQ(filled.source, "attention_config.default (DIFFUSION_ATTENTION_BACKEND)");
  EXPECT_TRUE(filled.is_explicit);
  EXPECT_EQ(get_attn_backend_for_role("self", 64, without).member, Enum::TORCH_SDPA);
}

TEST_F(Roles, ThenThePlatform) {
  const Selection selection = get_attn_backend_for_role("self");
  EXPECT_EQ(selection.member, Enum::FLASH_ATTN);
  EXPECT_EQ(selection.source, "platform default");
  EXPECT_FALSE(selection.is_explicit);
  EXPECT_FALSE(selection.spec);
}

TEST_F(Roles, AutoForARoleFallsThrough) {
  const AttentionConfig config =
      AttentionConfig::from_json(R"({"default": "sage_attn", "per_role": {"self": "auto", "video": "torch_sdpa"}})");
  EXPECT_EQ(get_attn_backend_for_role("self", 64, config, "video").member, Enum::TORCH_SDPA);
  EXPECT_EQ(get_attn_backend_for_role("self", 64, config).member, Enum::SAGE_ATTN);
}

TEST_F(Roles, EachResolutionIsLoggedOnce) {
  const std::vector<std::string> roles{unused("logged."), unused("logged.")};
  const LogRecorder log;
  for (int layer = 0; layer < 3; ++layer) get_attn_backend_for_role(roles[0], 64, config());
  get_attn_backend_for_role(roles[1], 64, config());
  const auto told = [](const std::string& role) {
    return "Resolved diffusion attention backend 'FLASH_ATTN' for role='" + role + "' via attention_config.default";
  };
  EXPECT_EQ(log.of(LogLevel::info), (std::vector<std::string>{told(roles[0]), told(roles[1])}));
}

TEST_F(Roles, ExplicitChoiceIsNeverReplaced) {
  const AttentionConfig explicit_config = AttentionConfig::from_json(R"({"default": "flash_attn"})");
  EXPECT_EQ(error_text<ValueError>([&] { get_attn_backend_for_role("self", 72, explicit_config); }),
            "FLASH_ATTN was explicitly selected but head_size=72 is unsupported. Supported head sizes: 1 to 64. Select "
            "TORCH_SDPA or another backend.");
  EXPECT_EQ(get_attn_backend_for_role("self", kHeadSizeUnknown, explicit_config).member, Enum::FLASH_ATTN);
  register_diffusion_backend(Enum::FLASH_ATTN, "roles_test.nowhere.Backend");
  error_text<ImportError>([&] { get_attn_backend_for_role("self", 64, explicit_config); });
}

TEST_F(Roles, UnknownNameInTheConfig) {
  const AttentionConfig config = AttentionConfig::from_json(R"({"per_role": {"self": "nope"}})");
  expect_contains(error_text<UnknownBackendError>([&] { get_attn_backend_for_role("self", 64, config); }),
                  {"Unknown diffusion attention backend: 'NOPE'. Valid options are: FLASH_ATTN, TORCH_SDPA, "});
  EXPECT_EQ(get_attn_backend_for_role("cross", 64, config).source, "platform default");
}

// --- The platform default's class

TEST_F(Roles, DefaultIsOneClassPerListOfCandidates) {
  EXPECT_EQ(get_attn_backend_for_role("a", 64).backend, get_attn_backend_for_role("b", 64).backend);
  EXPECT_EQ(get_attn_backend_for_role("a", 72).backend, Enum::TORCH_SDPA.get_class()) << "only one is left";
}

TEST_F(Roles, DefaultAnswersAsItsFirst) {
  const BackendClass backend = get_attn_backend_for_role("self", 64).backend;
  EXPECT_EQ(backend->get_name(), "SMALL");
  EXPECT_EQ(toy_answer(*backend), 3);
  EXPECT_TRUE(backend->supports_head_size(72)) << "TORCH_SDPA has it";
  EXPECT_TRUE(backend->explain({.head_size = 64, .lse = true}));
}

TEST_F(Roles, DefaultMovesOnAndLogsItOnce) {
  const auto attention =
      get_attn_backend_for_role("self", 1).backend->make({.num_heads = 1, .head_size = 1, .prefix = "blocks.0"});
  const Tensor x = testing::counting({1, 3, 1, 1});
  const Tensor lse = empty({1, 1, 3}, kFloat32);
  const LogRecorder log;
  for (int call = 0; call < 3; ++call) {
    const Tensor out = attention->forward(x, x, x, {}, {.out = {}, .lse = lse});
    EXPECT_EQ(load_element(data_pointer(out), 0, kFloat32), 2) << "TORCH_SDPA's answer";
  }
  EXPECT_EQ(load_element(data_pointer(attention->forward(x, x, x)), 0, kFloat32), 1) << "FLASH_ATTN's answer";
  EXPECT_EQ(log.of(LogLevel::info),
            (std::vector<std::string>{
                "Platform default moves on to TORCH_SDPA in 'blocks.0': SMALL does not return the log-sum-exp."}));
}

TEST_F(Roles, DefaultThatNobodyTakesListsEveryReason) {
  const BackendClass backend = get_attn_backend_for_role("self", 64).backend;
  expect_contains(backend->explain({.head_size = 64, .spans = true}).text(),
                  {"Attention backend 'SMALL' does not support piecewise attention",
                   "Attention backend 'ANY' does not support piecewise attention"});
}

TEST_F(Roles, DefaultWarnsOfOptionsThatNoCandidateKnows) {
  const LogRecorder log;
  const auto attention =
      get_attn_backend_for_role("self", 64)
          .backend->make({.num_heads = 1, .head_size = 64, .backend_kwargs = {{"known", 1}, {"unknown", 1}}});
  EXPECT_EQ(log.of(LogLevel::warning), (std::vector<std::string>{"SMALL ignoring backend_kwargs: ['unknown']"}));
}

// A causal problem goes to another rule's backend only where both rules come to the same.
TEST_F(Roles, DefaultKeepsItsCausalRule) {
  Capabilities top_left = testing::toy_capabilities();
  top_left.causal_alignment = CausalAlignment::top_left;
  use(Enum::TORCH_SDPA, std::make_shared<ToyBackend>("TOP_LEFT", 2, top_left));
  const BackendClass backend = get_attn_backend_for_role("self", 64).backend;
  const auto takes = [&](const Problem& problem) { return static_cast<bool>(backend->explain(problem)); };
  EXPECT_TRUE(takes({.seq_q = 8, .seq_kv = 8, .head_size = 64, .causal = true, .lse = true}));
  EXPECT_TRUE(takes({.seq_q = 4, .seq_kv = 8, .head_size = 64, .causal = false, .lse = true}));
  EXPECT_TRUE(takes({.seq_q = 4, .seq_kv = 8, .head_size = 64, .causal = true}));
  EXPECT_EQ(
      backend->explain({.seq_q = 4, .seq_kv = 8, .head_size = 64, .causal = true, .lse = true}).text(),
      "SMALL does not return the log-sum-exp.; TORCH_SDPA aligns causality otherwise than FLASH_ATTN (4 queries, 8 "
      "keys)");
  error_text<ValueError>(
      [] { select_backend({.seq_q = 4, .seq_kv = 8, .head_size = 64, .causal = true, .lse = true}); });
}

TEST_F(Roles, DefaultKeepsItsCausalRuleForPackedSequences) {
  Capabilities packed = testing::toy_capabilities();
  packed.packed = true;
  packed.causal_alignment = CausalAlignment::top_left;
  use(Enum::TORCH_SDPA, std::make_shared<ToyBackend>("TOP_LEFT", 2, packed));
  const BackendClass backend = get_attn_backend_for_role("self", 64).backend;
  EXPECT_TRUE(backend->explain({.seq_q = 8, .seq_kv = 8, .head_size = 64, .packed = true}));
  EXPECT_FALSE(backend->explain({.seq_q = 8, .seq_kv = 8, .head_size = 64, .causal = true, .packed = true}));
}

TEST_F(Roles, KeepsWorkingWhenARegistrationChanges) {
  const auto before = get_attn_backend_for_role("self", 64).backend;
  use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>("OTHER", 5));
  EXPECT_EQ(toy_answer(*get_attn_backend_for_role("self", 64).backend), 15);
  EXPECT_EQ(toy_answer(*before), 3);
}

// --- Platforms

using Members = std::vector<Enum>;

TEST(Platforms, Cpu) { EXPECT_EQ(platform_candidates(Platform{}), (Members{Enum::FLASH_ATTN, Enum::TORCH_SDPA})); }

TEST(Platforms, AmpereAdaHopper) {
  for (const std::int64_t capability : {80, 86, 89, 90}) {
    EXPECT_EQ(platform_candidates(Platform{.device = "cuda", .compute_capability = capability}),
              (Members{Enum::FLASH_ATTN, Enum::CUDNN_ATTN, Enum::FLASHINFER_ATTN, Enum::TORCH_SDPA}))
        << capability;
  }
}

TEST(Platforms, Blackwell) {
  for (const std::int64_t capability : {100, 103, 120, 121}) {
    EXPECT_EQ(platform_candidates(Platform{.device = "cuda", .compute_capability = capability, .cudnn_version = 90500}),
              (Members{Enum::CUDNN_ATTN, Enum::FLASHINFER_ATTN, Enum::FLASH_ATTN, Enum::TORCH_SDPA}));
    EXPECT_EQ(platform_candidates(Platform{.device = "cuda", .compute_capability = capability, .cudnn_version = 90499}),
              (Members{Enum::FLASHINFER_ATTN, Enum::FLASH_ATTN, Enum::TORCH_SDPA}));
  }
}

TEST(Platforms, BeforeAmpere) {
  EXPECT_EQ(platform_candidates(Platform{.device = "cuda", .compute_capability = 75}), (Members{Enum::TORCH_SDPA}));
}

TEST(Platforms, CanBeDefined) {
  const std::string npu = unused("roles_test_npu");
  error_text<ValueError>([&] { platform_candidates(Platform{.device = npu}); });
  define_platform(npu, {Enum::CUSTOM, Enum::TORCH_SDPA});
  EXPECT_EQ(platform_candidates(npu), (Members{Enum::CUSTOM, Enum::TORCH_SDPA}));
  define_platform(npu, {Enum::CUSTOM});
  EXPECT_EQ(platform_candidates(npu), (Members{Enum::CUSTOM}));
  error_text<ValueError>([] { define_platform("", {Enum::CUSTOM}); });
  error_text<ValueError>([&] { define_platform(npu, {}); });
}

}  // namespace
}  // namespace ditattn
