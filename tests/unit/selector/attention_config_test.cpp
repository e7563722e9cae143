// AttentionConfig from JSON, files and flags: what is taken, and the message of everything that is not.

#include "ditattn/attention_config.hpp"

#include <gtest/gtest.h>
#include <tvm/ffi/container/array.h>

#include <filesystem>
#include <fstream>

#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::error_text;
using testing::expect_contains;

// Backends by role, as text: "self=FLASH_ATTN ltx2.a=TORCH_SDPA".
std::string roles(const AttentionConfig& config) {
  std::string text;
  for (const auto& [role, spec] : config.per_role) text += (text.empty() ? "" : " ") + role + "=" + spec.backend;
  return text;
}

std::string default_of(const AttentionConfig& config) {
  return config.default_spec ? config.default_spec->backend : "not set";
}

TEST(AttentionConfig, DefaultByNameInAnyCase) {
  for (const char* name : {"FLASH_ATTN", "flash_attn", "Flash_Attn"}) {
    EXPECT_EQ(default_of(AttentionConfig::from_json(std::string(R"({"default": ")") + name + "\"}")), "FLASH_ATTN");
  }
}

TEST(AttentionConfig, DefaultAsSpecWithOptions) {
  const AttentionConfig config = AttentionConfig::from_json(
      R"({"default": {"backend": "sage_attn", "backend_kwargs": {"smooth_k": true, "n": 3, "x": 0.5, "s": "t",
          "list": [1, "a"], "none": null, "map": {"a": {"b": 1}}}}})");
  ASSERT_TRUE(config.default_spec);
  EXPECT_EQ(config.default_spec->backend, "SAGE_ATTN");
  const BackendKwargs& kwargs = config.default_spec->backend_kwargs;
  EXPECT_EQ(kwargs.size(), 7U);
  EXPECT_TRUE(kwargs.at("smooth_k").cast<bool>());
  EXPECT_EQ(kwargs.at("n").cast<std::int64_t>(), 3);
  EXPECT_EQ(kwargs.at("x").cast<double>(), 0.5);
  EXPECT_EQ(std::string(kwargs.at("s").cast<tvm::ffi::String>()), "t");
  EXPECT_EQ(kwargs.at("list").cast<tvm::ffi::Array<tvm::ffi::Any>>().size(), 2U);
  EXPECT_TRUE(kwargs.at("none") == nullptr);
  EXPECT_EQ(kwargs.at("map").cast<BackendKwargs>().at("a").cast<BackendKwargs>().at("b").cast<std::int64_t>(), 1);
}

TEST(AttentionConfig, AutoAndNullMeanNotSet) {
  for (const char* value :
       {R"("auto")", R"("AUTO")", R"("Auto")", "null", R"({"backend": "auto"})", R"({"backend": null})"}) {
    const AttentionConfig config = AttentionConfig::from_json(std::string(R"({"default": )") + value +
                                                              R"(, "per_role": {"self": )" + value + "}}");
    EXPECT_EQ(default_of(config), "not set") << value;
    EXPECT_EQ(roles(config), "") << value;
  }
  EXPECT_EQ(default_of(AttentionConfig::from_json("{}")), "not set");
  EXPECT_EQ(roles(AttentionConfig::from_json(R"({"per_role": null})")), "");
}

TEST(AttentionConfig, NestedRolesJoinWithDots) {
  EXPECT_EQ(roles(AttentionConfig::from_json(R"({"per_role": {
      "self": "flash_attn", "cross": {"backend": "torch_sdpa"},
      "ltx2": {"audio_to_video": "sage_attn", "deep": {"er": {"backend": "CUSTOM"}}},
      "already.dotted": "CUDNN_ATTN"}})")),
            "already.dotted=CUDNN_ATTN cross=TORCH_SDPA ltx2.audio_to_video=SAGE_ATTN ltx2.deep.er=CUSTOM "
            "self=FLASH_ATTN");
}

TEST(AttentionConfig, QuantGoesToFlashInfersOptions) {
  const AttentionConfig config = AttentionConfig::from_json(
      R"({"per_role": {"self": {"backend": "FLASHINFER_ATTN", "quant": {"dtype_qk": "float16"}}}})");
  const BackendKwargs quant = config.per_role.at("self").backend_kwargs.at("quant").cast<BackendKwargs>();
  EXPECT_EQ(std::string(quant.at("dtype_qk").cast<tvm::ffi::String>()), "float16");
}

TEST(AttentionConfig, OtherBackendsOptionsMayBeSwitchedOff) {
  EXPECT_EQ(default_of(AttentionConfig::from_json(
                R"({"default": {"backend": "flash_attn", "block_sparse": false, "skip_softmax": null}})")),
            "FLASH_ATTN");
}

struct Bad {
  const char* name;
  std::string json;
  const char* message;
};
void PrintTo(const Bad& bad, std::ostream* stream) { *stream << bad.name; }

class BadAttentionConfig : public ::testing::TestWithParam<Bad> {};

TEST_P(BadAttentionConfig, SaysWhat) {
  expect_contains(error_text<ConfigError>([&] { AttentionConfig::from_json(GetParam().json); }), {GetParam().message});
}

std::string nested(int depth) {
  std::string text = R"({"per_role": )";
  for (int i = 0; i < depth; ++i) text += R"({"a": )";
  text += R"("FLASH_ATTN")";
  return text + std::string(static_cast<std::size_t>(depth) + 1, '}');
}

INSTANTIATE_TEST_SUITE_P(
    Config, BadAttentionConfig,
    ::testing::Values(
        Bad{"MixedEntry", R"({"per_role": {"self": {"backend": "FLASH_ATTN", "nested": "TORCH_SDPA"}}})",
            "Invalid per_role entry for role 'self': cannot mix backend/skip_softmax with nested role keys."},
        Bad{"MixedNestedEntry", R"({"per_role": {"a": {"b": {"skip_softmax": 1, "c": "TORCH_SDPA"}}}})",
            "Invalid per_role entry for role 'a.b': cannot mix backend/skip_softmax with nested role keys."},
        Bad{"EmptyEntry", R"({"per_role": {"self": {}}})", "Empty per_role entry for role 'self'"},
        Bad{"EmptyNestedEntry", R"({"per_role": {"a": {"b": {}}}})", "Empty per_role entry for role 'a.b'"},
        Bad{"EmptyDefault", R"({"default": {}})", "Empty entry for AttentionConfig.default"},
        Bad{"BackendOfInt", R"({"default": {"backend": 3}})", "Expected str for AttentionSpec.backend, got int"},
        Bad{"BackendOfList", R"({"default": {"backend": ["FLASH_ATTN"]}})",
            "Expected str for AttentionSpec.backend, got list"},
        Bad{"BackendOfBool", R"({"per_role": {"self": {"backend": true}}})",
            "Expected str for AttentionSpec.backend, got bool"},
        Bad{"BackendEmpty", R"({"default": ""})", "AttentionSpec.backend is an empty string."},
        Bad{"PerRoleOfList", R"({"per_role": []})", "Expected dict for AttentionConfig.per_role, got list"},
        Bad{"PerRoleOfStr", R"({"per_role": "FLASH_ATTN"})", "Expected dict for AttentionConfig.per_role, got str"},
        Bad{"RoleOfFloat", R"({"per_role": {"self": 1.5}})",
            "Expected str or dict for the per_role entry for role 'self', got float"},
        Bad{"DefaultOfInt", R"({"default": 3})", "Expected str or dict for AttentionConfig.default, got int"},
        Bad{"UnknownKey", R"({"defualt": "FLASH_ATTN"})",
            "Unknown key 'defualt' in AttentionConfig. Valid keys are: default, per_role"},
        Bad{"UnknownSpecKey", R"({"default": {"backend": "FLASH_ATTN", "bakend_kwargs": {}}})",
            "Unknown key 'bakend_kwargs' in AttentionConfig.default. Valid keys are: backend, backend_kwargs, "},
        Bad{"OptionsWithoutBackend", R"({"default": {"backend_kwargs": {"a": 1}}})",
            "AttentionConfig.default has options but no backend that they are for."},
        Bad{"KwargsOfList", R"({"default": {"backend": "FLASH_ATTN", "backend_kwargs": [1]}})",
            "Expected dict for AttentionSpec.backend_kwargs, got list"},
        Bad{"HugeNumber", R"({"default": {"backend": "FLASH_ATTN", "backend_kwargs": {"n": 18446744073709551615}}})",
            "AttentionConfig has the number 18446744073709551615, which is beyond 9223372036854775807."},
        Bad{"QuantElsewhere", R"({"default": {"backend": "flash_attn", "quant": {}}})",
            "quant is only supported by the TRTLLM_ATTN and FLASHINFER_ATTN backends, but backend=FLASH_ATTN"},
        Bad{"SkipSoftmax", R"({"default": {"backend": "flash_attn", "skip_softmax": 0.1}})",
            "skip_softmax is only supported by the TRTLLM_ATTN backend, but backend=FLASH_ATTN"},
        Bad{"BlockSparse", R"({"default": {"backend": "flash_attn", "block_sparse": true}})",
            "block_sparse belongs to a backend that ditattn does not have, but backend=FLASH_ATTN."},
        Bad{"SameRoleTwice", R"({"per_role": {"a.b": "FLASH_ATTN", "a": {"b": "TORCH_SDPA"}}})",
            "AttentionConfig.per_role has role 'a.b' twice."},
        Bad{"EmptyRole", R"({"per_role": {"": "FLASH_ATTN"}})", "has the role '': names must not be empty."},
        Bad{"EmptyRoleSegment", R"({"per_role": {"a..b": "FLASH_ATTN"}})", "has the role 'a..b'"},
        Bad{"List", "[1]", "Expected dict for AttentionConfig, got list"},
        Bad{"NotJson", R"({"default": )", "AttentionConfig is not JSON: "},
        Bad{"NotUtf8", "{\"default\": \"\xff\"}", "AttentionConfig is not JSON: "},
        Bad{"TooDeep", nested(100000), "AttentionConfig is nested deeper than 32 levels."}),
    [](const auto& test) { return test.param.name; });

TEST(AttentionConfigFile, IsReadUnlessTheTextIsJson) {
  const std::filesystem::path file = std::filesystem::path(::testing::TempDir()) / "attention_config_test.json";
  std::ofstream(file) << R"({"default": "sage_attn"})";
  EXPECT_EQ(default_of(AttentionConfig::from_json_or_file(file.string())), "SAGE_ATTN");
  EXPECT_EQ(default_of(AttentionConfig::from_json_or_file("  \n{\"default\": \"torch_sdpa\"}")), "TORCH_SDPA");
  std::ofstream(file) << "default: sage_attn";
  expect_contains(error_text<ConfigError>([&] { AttentionConfig::from_json_or_file(file.string()); }),
                  {"AttentionConfig file '" + file.string() + "' is not JSON: "});
  std::ofstream(file, std::ios::trunc).close();
  error_text<ConfigError>([&] { AttentionConfig::from_json_or_file(file.string()); });
  std::filesystem::remove(file);
  for (const std::string& missing : {file.string(), ::testing::TempDir(), std::string()}) {
    expect_contains(error_text<FileError>([&] { AttentionConfig::from_json_or_file(missing); }),
                    {"Cannot read the AttentionConfig file '" + missing + "'."});
  }
}

TEST(AttentionFlags, BackendFillsDefault) {
  EXPECT_EQ(default_of(config_from_flags({})), "not set");
  EXPECT_EQ(default_of(config_from_flags({.backend = "sage_attn"})), "SAGE_ATTN");
  EXPECT_EQ(default_of(config_from_flags({.backend = "auto"})), "not set");
  const AttentionConfig both =
      config_from_flags({.backend = "sage_attn", .config = R"({"default": "auto", "per_role": {"self": "CUSTOM"}})"});
  EXPECT_EQ(default_of(both), "SAGE_ATTN");
  EXPECT_EQ(roles(both), "self=CUSTOM");
}

TEST(AttentionFlags, DotsWithoutEndAreRefused) {
  std::string path = "per_role";
  for (int i = 0; i < 50000; ++i) path += ".a";
  expect_contains(error_text<ConfigError>([&] {
                    static_cast<void>(config_from_flags({.settings = {{path, "auto"}}}));
                  }),
                  {"--diffusion-attention-config.per_role.a.a", "nested deeper than 32 levels"});
}

TEST(AttentionFlags, BackendAndConfigsDefaultExclude) {
  const char* message =
      "--diffusion-attention-backend is mutually exclusive with --diffusion-attention-config.default.backend.";
  const AttentionFlags by_json{.backend = "sage_attn", .config = R"({"default": "flash_attn"})"};
  const AttentionFlags by_setting{.backend = "sage_attn", .settings = {{"default.backend", "flash_attn"}}};
  EXPECT_EQ(error_text<ConfigError>([&] { config_from_flags(by_json); }), message);
  EXPECT_EQ(error_text<ConfigError>([&] { config_from_flags(by_setting); }), message);
}

TEST(AttentionFlags, DottedSettingsGoOnTopOfTheConfig) {
  const AttentionConfig config =
      config_from_flags({.config = R"({"default": "flash_attn", "per_role": {"self": "CUSTOM"}})",
                         .settings = {{"default.backend", "torch_sdpa"},
                                      {"per_role.cross", "sage_attn"},
                                      {"per_role.ltx2.audio_to_video.backend", "cudnn_attn"}}});
  EXPECT_EQ(default_of(config), "TORCH_SDPA");
  EXPECT_EQ(roles(config), "cross=SAGE_ATTN ltx2.audio_to_video=CUDNN_ATTN self=CUSTOM");
}

// What a document says is UTF-8 once it is read; what a command line says need not be.
TEST(AttentionFlags, ValuesThatAreNoUtf8AreShown) {
  expect_contains(
      error_text<ConfigError>([] {
        config_from_flags({.settings = {{"per_role.a.backend", "SAGE_ATTN"}, {"per_role.a.allowed", "x\xe6"}}});
      }),
      {"AttentionSpec.allowed is \"x\\ufffd\", expected a list"});
}

TEST(AttentionFlags, DottedSettingsThatFitNowhere) {
  expect_contains(error_text<ConfigError>([] {
                    config_from_flags({.settings = {{"nothing", "x"}}});
                  }),
                  {"Unknown key 'nothing' in AttentionConfig."});
  expect_contains(error_text<ConfigError>([] {
                    config_from_flags({.config = R"({"per_role": []})", .settings = {{"per_role.a", "x"}}});
                  }),
                  {"--diffusion-attention-config.per_role.a: 'a' is not inside a dict."});
}

}  // namespace
}  // namespace ditattn
