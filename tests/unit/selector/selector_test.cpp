// Which backend is used where nobody names one: DIFFUSION_ATTENTION_BACKEND, then the platform's ordered candidates.

#include "ditattn/selector.hpp"

#include <gtest/gtest.h>

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
  static void use(Enum member, BackendClass backend) {
    const std::string path = "selector_test." + member.name() + ".Backend";
    register_backend_class(path, std::move(backend));
    register_diffusion_backend(member, path);
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
  select_backend({.head_size = 73}, "selector_test.role");
  EXPECT_EQ(
      log.of(LogLevel::info),
      (std::vector<std::string>{
          "Platform default passes over FLASH_ATTN: does not support head_size=73. Supported head sizes: 1 to 64.",
          "Resolved diffusion attention backend 'TORCH_SDPA' for role='selector_test.role' via platform "
          "default"}));
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

TEST_F(Selector, ExplicitCustomMustBeRegistered) {
  const ScopedEnvironment variable(kVariable, "custom");
  error_text<NotRegisteredError>([] { select_backend({}); });
  register_diffusion_backend<ToyBackend>(Enum::CUSTOM);
  EXPECT_EQ(select_backend({}).backend->get_name(), "TOY");
}

}  // namespace
}  // namespace ditattn
