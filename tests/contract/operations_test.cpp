// The operations of the enumeration: one test each, named after it. tests/unit/registry has their corners.

#include <gtest/gtest.h>

#include <sstream>

#include "ditattn/ditattn.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace contract_test {
class Registered : public ditattn::testing::ToyBackend {
 public:
  Registered() : ToyBackend("REGISTERED", 7) {}
};
}  // namespace contract_test

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;

class ContractOperation : public testing::RegistryTest {};

TEST_F(ContractOperation, LookUpByName) {
  EXPECT_EQ(Enum::from_name("SAGE_ATTN"), Enum::SAGE_ATTN);
  expect_contains(error_text<ValueError>([] { Enum::from_name("sage_attn"); }),
                  {"Unknown diffusion attention backend: 'sage_attn'. Valid options are: FLASH_ATTN, TORCH_SDPA, "
                   "SAGE_ATTN, SAGE_ATTN_3, CUDNN_ATTN, FLASHINFER_ATTN, CUSTOM"});
}

TEST_F(ContractOperation, Members) {
  const std::string name = testing::unused("CONTRACT_TEST");
  const Enum defined = Enum::define(name, "a.b.C");
  EXPECT_EQ(defined.name(), name);
  EXPECT_EQ(Enum::members().back(), defined);
  EXPECT_EQ(std::hash<Enum>()(defined), std::hash<Enum>()(Enum::from_name(name)));
  std::ostringstream text;
  text << defined;
  EXPECT_EQ(text.str(), name);
  EXPECT_EQ(Enum::define(name, "a.b.C"), defined);
  error_text<ValueError>([&] { Enum::define(name, "a.b.D"); });
}

TEST_F(ContractOperation, DefaultValue) {
  register_diffusion_backend(Enum::FLASH_ATTN, "a.b.C");
  EXPECT_EQ(Enum::FLASH_ATTN.value(), "vllm_omni.diffusion.attention.backends.flash_attn.FlashAttentionBackend");
}

TEST_F(ContractOperation, GetPath) {
  EXPECT_EQ(Enum::SAGE_ATTN_3.get_path(), Enum::SAGE_ATTN_3.value());
  EXPECT_EQ(Enum::SAGE_ATTN_3.get_path(false), "vllm_omni.diffusion.attention.backends.sage_attn3");
  register_diffusion_backend(Enum::SAGE_ATTN_3, "a.b.C");
  EXPECT_EQ(Enum::SAGE_ATTN_3.get_path(), "a.b.C");
  EXPECT_EQ(Enum::SAGE_ATTN_3.get_path(false), "a.b");
  EXPECT_EQ(error_text<ValueError>([] { return Enum::CUSTOM.get_path(); }),
            "Backend CUSTOM must be registered before use. Use "
            "register_diffusion_backend(DiffusionAttentionBackendEnum.CUSTOM, 'your.module.YourClass')");
}

TEST_F(ContractOperation, GetClass) {
  register_diffusion_backend<contract_test::Registered>(Enum::CUSTOM);
  EXPECT_EQ(testing::toy_answer(*Enum::CUSTOM.get_class()), 21);
  register_diffusion_backend(Enum::CUSTOM, "contract_test.no_module.Class");
  expect_contains(error_text<ImportError>([] { return Enum::CUSTOM.get_class(); }),
                  {"Cannot import 'contract_test.no_module.Class': no such module. Looked in:",
                   "/contract_test/no_module.so: no such file"});
  register_diffusion_backend(Enum::CUSTOM, Enum::FLASH_ATTN.get_path(false) + ".NoSuchClass");
  expect_contains(error_text<ImportError>([] { return Enum::CUSTOM.get_class(); }), {"no such class 'NoSuchClass'"});
  for (const char* malformed : {"nodot", "a..b", "../a.B", "a.b-c.D", ".a", "a."}) {
    register_diffusion_backend(Enum::CUSTOM, malformed);
    error_text<ClassPathError>([] { return Enum::CUSTOM.get_class(); });
  }
}

TEST_F(ContractOperation, IsOverriddenAndClearOverride) {
  EXPECT_FALSE(Enum::FLASH_ATTN.is_overridden());
  Enum::FLASH_ATTN.clear_override();
  register_diffusion_backend(Enum::FLASH_ATTN, "a.b.C");
  EXPECT_TRUE(Enum::FLASH_ATTN.is_overridden());
  Enum::FLASH_ATTN.clear_override();
  Enum::FLASH_ATTN.clear_override();
  EXPECT_FALSE(Enum::FLASH_ATTN.is_overridden());
  EXPECT_EQ(Enum::FLASH_ATTN.get_path(), Enum::FLASH_ATTN.value());
}

TEST_F(ContractOperation, RegisterByClassPath) {
  const auto identity = register_diffusion_backend(Enum::CUSTOM, "not even a path");
  int value = 0;
  EXPECT_EQ(&identity(value), &value);
  EXPECT_EQ(Enum::CUSTOM.get_path(), "not even a path") << "neither imported nor checked";
}

TEST_F(ContractOperation, RegisterByClass) {
  register_diffusion_backend<contract_test::Registered>(Enum::CUSTOM);
  EXPECT_EQ(Enum::CUSTOM.get_path(), "contract_test.Registered");
  EXPECT_EQ(resolve_class_path("contract_test.Registered"), Enum::CUSTOM.get_class());
}

// The error types derive from one base, and are what Python calls them.
TEST_F(ContractOperation, ErrorTypes) {
  EXPECT_EQ(ValueError("x").kind(), "ValueError");
  EXPECT_EQ(ImportError("x").kind(), "ImportError");
  EXPECT_EQ(NotImplementedError("x").kind(), "NotImplementedError");
  static_assert(std::is_base_of_v<Error, ValueError> && std::is_base_of_v<Error, ImportError> &&
                std::is_base_of_v<Error, NotImplementedError>);
}

TEST_F(ContractOperation, BrokenBackendLeavesTheOthersAndTheListing) {
  register_diffusion_backend(Enum::SAGE_ATTN, "contract_test.no_module.Class");
  error_text<ImportError>([] { return Enum::SAGE_ATTN.get_class(); });
  EXPECT_EQ(Enum::FLASH_ATTN.get_class()->get_name(), "FLASH_ATTN");
  EXPECT_GE(Enum::members().size(), 7U);
}

}  // namespace
}  // namespace ditattn
