// Selection: one test per promise, named after it. tests/unit/selector has the corners.

#include <gtest/gtest.h>

#include "ditattn/ditattn.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::ScopedEnvironment;

constexpr const char* kVariable = "DIFFUSION_ATTENTION_BACKEND";

class ContractSelection : public testing::RegistryTest {
 protected:
  const ScopedEnvironment unset_{kVariable, nullptr};
};

TEST_F(ContractSelection, PrecedenceRoleCategoryDefaultPlatform) {
  const auto chosen = [](const char* json, const char* role) {
    return get_attn_backend_for_role(role, 64, AttentionConfig::from_json(json), "video").source;
  };
  EXPECT_EQ(chosen(R"({"default": "TORCH_SDPA", "per_role": {"self": "torch_sdpa", "video": "TORCH_SDPA"}})", "self"),
            "attention_config.per_role['self']");
  EXPECT_EQ(chosen(R"({"default": "TORCH_SDPA", "per_role": {"self": "auto", "video": "TORCH_SDPA"}})", "self"),
            "attention_config.per_role['video'] (role_category fallback)");
  EXPECT_EQ(chosen(R"({"default": "TORCH_SDPA"})", "self"), "attention_config.default");
  EXPECT_EQ(chosen(R"({"default": "AUTO"})", "self"), "platform default");
}

TEST_F(ContractSelection, NestedRoleKeysJoinWithDots) {
  const AttentionConfig config =
      AttentionConfig::from_json(R"({"per_role": {"ltx2": {"audio_to_video": "torch_sdpa"}}})");
  EXPECT_EQ(get_attn_backend_for_role("ltx2.audio_to_video", 64, config).member, Enum::TORCH_SDPA);
}

TEST_F(ContractSelection, MixedAndEmptyEntriesAreValueErrors) {
  error_text<ConfigError>(
      [] { AttentionConfig::from_json(R"({"per_role": {"self": {"backend": "FLASH_ATTN", "x": "FLASH_ATTN"}}})"); });
  error_text<ConfigError>([] { AttentionConfig::from_json(R"({"per_role": {"self": {}}})"); });
  static_assert(std::is_base_of_v<ValueError, ConfigError>);
}

TEST_F(ContractSelection, EnvironmentFillsDefaultAndFlagsWinOverIt) {
  const ScopedEnvironment variable(kVariable, "torch_sdpa");
  EXPECT_EQ(get_attn_backend_for_role("self", 64).member, Enum::TORCH_SDPA);
  EXPECT_EQ(get_attn_backend_for_role("self", 64, config_from_flags({.backend = "flash_attn"})).member,
            Enum::FLASH_ATTN);
  EXPECT_EQ(get_attn_backend_for_role("self", 64, config_from_flags({.config = R"({"default": "flash_attn"})"})).member,
            Enum::FLASH_ATTN);
}

TEST_F(ContractSelection, BothFlagsThatSetDefaultAreAValueError) {
  EXPECT_EQ(error_text<ConfigError>(
                [] { config_from_flags({.backend = "flash_attn", .config = R"({"default": "torch_sdpa"})"}); }),
            "--diffusion-attention-backend is mutually exclusive with --diffusion-attention-config.default.backend.");
}

TEST_F(ContractSelection, PlatformDefaultOnTheCpu) {
  const Selection selection = get_attn_backend_for_role("self", 72);
  EXPECT_EQ(selection.member, Enum::FLASH_ATTN);
  EXPECT_FALSE(selection.is_explicit);
}

TEST_F(ContractSelection, ExplicitChoiceIsNeverReplaced) {
  for (const char* name : {"SAGE_ATTN", "CUSTOM"}) {
    register_diffusion_backend(Enum::from_name(name), "contract_test.no_module.Class");
    const ScopedEnvironment variable(kVariable, name);
    error_text<ImportError>([] { get_attn_backend_for_role("self", 64); });
    error_text<ImportError>([] { select_backend({.head_size = 64}); });
  }
}

}  // namespace
}  // namespace ditattn
