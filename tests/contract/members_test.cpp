// The members: one test each, named after it. Default class path, reported name, and what the class is.

#include <gtest/gtest.h>

#include "ditattn/ditattn.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;

class ContractMember : public testing::RegistryTest {
 protected:
  // The class path is fixed; a class that can be had reports `reported` and computes the mean of equal values; one that
  // cannot says why.
  static void check(Enum member, const std::string& path, const std::string& reported) {
    EXPECT_EQ(member.value(), "vllm_omni.diffusion.attention.backends." + path);
    EXPECT_EQ(member.get_path(), member.value());
    BackendClass backend;
    try {
      backend = member.get_class();
    } catch (const ImportError& error) {
      expect_contains(error.message(), {member.value()});
      GTEST_SKIP() << member.name() << " cannot run here: " << error.message();
    }
    try {
      backend->validate_available();
    } catch (const ImportError& error) {
      expect_contains(error.message(), {member.name()});
      GTEST_SKIP() << error.message();
    }
    EXPECT_EQ(backend->get_name(), reported);
    if (backend->capabilities().devices.front() != "cpu") return;  // numbers on a GPU: conformance
    const Tensor x = empty({1, 5, 2, 64}, kFloat32);
    for (std::int64_t i = 0; i < x.numel(); ++i) store_element(x.data_ptr(), i, kFloat32, 0.75);
    const Tensor out = backend->make({.num_heads = 2, .head_size = 64})->forward(x, x, x);
    for (std::int64_t i = 0; i < out.numel(); ++i) {
      ASSERT_NEAR(load_element(out.data_ptr(), i, kFloat32), 0.75, 1e-6) << i;
    }
  }
};

TEST_F(ContractMember, FLASH_ATTN) { check(Enum::FLASH_ATTN, "flash_attn.FlashAttentionBackend", "FLASH_ATTN"); }
TEST_F(ContractMember, TORCH_SDPA) { check(Enum::TORCH_SDPA, "sdpa.SDPABackend", "SDPA"); }
TEST_F(ContractMember, SAGE_ATTN) { check(Enum::SAGE_ATTN, "sage_attn.SageAttentionBackend", "SAGE_ATTN"); }
TEST_F(ContractMember, SAGE_ATTN_3) { check(Enum::SAGE_ATTN_3, "sage_attn3.SageAttention3Backend", "SAGE_ATTN_3"); }
TEST_F(ContractMember, CUDNN_ATTN) { check(Enum::CUDNN_ATTN, "cudnn_attn.CuDNNAttentionBackend", "CUDNN_ATTN"); }
TEST_F(ContractMember, FLASHINFER_ATTN) {
  check(Enum::FLASHINFER_ATTN, "flashinfer_attn.FlashInferAttentionBackend", "FLASHINFER_ATTN");
}

TEST_F(ContractMember, CUSTOM) {
  EXPECT_EQ(Enum::CUSTOM.value(), "");
  EXPECT_EQ(error_text<ValueError>([] { return Enum::CUSTOM.get_class(); }),
            "Backend CUSTOM must be registered before use. Use "
            "register_diffusion_backend(DiffusionAttentionBackendEnum.CUSTOM, 'your.module.YourClass')");
}

TEST_F(ContractMember, DefinedAtRunTime) {
  const Enum ascend = Enum::define(testing::unused("ASCEND_ATTN"));
  EXPECT_EQ(ascend.value(), "");
  EXPECT_EQ(Enum::members().back(), ascend);
  register_diffusion_backend(ascend, Enum::TORCH_SDPA.value());
  EXPECT_EQ(ascend.get_class(), Enum::TORCH_SDPA.get_class());
}

TEST_F(ContractMember, DefinitionOrder) {
  const std::vector<Enum> members = Enum::members();
  const std::vector<Enum> expected = {Enum::FLASH_ATTN, Enum::TORCH_SDPA,      Enum::SAGE_ATTN, Enum::SAGE_ATTN_3,
                                      Enum::CUDNN_ATTN, Enum::FLASHINFER_ATTN, Enum::CUSTOM};
  ASSERT_GE(members.size(), expected.size());
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), members.begin()));
}

}  // namespace
}  // namespace ditattn
