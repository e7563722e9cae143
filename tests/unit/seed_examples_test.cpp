// The uses the registry is made for, each as a user writes it, with forward through the class at the end: get a class;
// override a member with one's own class (by path, by class, as a decorator); define a member of one's own; CUSTOM.

#include <gtest/gtest.h>

#include "ditattn/ditattn.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/toy_backend.hpp"

// A user's classes, wherever users put them.
class MyBackend : public ditattn::testing::ToyBackend {
 public:
  MyBackend() : ToyBackend("MY_BACKEND", 1) {}
};

namespace vendor::attention {
class Ascend : public ditattn::testing::ToyBackend {
 public:
  Ascend() : ToyBackend("ASCEND_ATTN", 2) {}
};
struct Kernels {
  class Nested : public ditattn::testing::ToyBackend {
   public:
    Nested() : ToyBackend("NESTED", 3) {}
  };
};
namespace {
class Hidden : public ditattn::testing::ToyBackend {
 public:
  Hidden() : ToyBackend("HIDDEN", 4) {}
};
}  // namespace
}  // namespace vendor::attention

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::toy_answer;  // 3 times the class's factor

class SeedExamples : public testing::RegistryTest {};

TEST_F(SeedExamples, GetAClassByName) {
  register_diffusion_backend<MyBackend>(Enum::FLASH_ATTN);  // so that no installed backend is needed
  const BackendClass backend = Enum::from_name("FLASH_ATTN").get_class();
  EXPECT_EQ(backend->get_name(), "MY_BACKEND");
  const auto attention = backend->get_impl_cls()({.num_heads = 1, .head_size = 4});
  const Tensor value = testing::counting({1, 2, 1, 4});
  const Tensor out = attention->forward(value, value, testing::counting({1, 2, 1, 4}));
  EXPECT_EQ(load_element(data_pointer(out), 3, kFloat32), 5);  // mean of 3 and 7
}

TEST_F(SeedExamples, OverrideByPath) {
  register_backend_class("my_package.my_module.MyBackend", std::make_shared<MyBackend>());
  register_diffusion_backend(Enum::FLASH_ATTN, "my_package.my_module.MyBackend");
  EXPECT_TRUE(Enum::FLASH_ATTN.is_overridden());
  EXPECT_EQ(Enum::FLASH_ATTN.get_path(), "my_package.my_module.MyBackend");
  EXPECT_EQ(Enum::FLASH_ATTN.get_path(false), "my_package.my_module");
  EXPECT_EQ(toy_answer(*Enum::FLASH_ATTN.get_class()), 3);
  Enum::FLASH_ATTN.clear_override();
  EXPECT_EQ(Enum::FLASH_ATTN.get_path(), "vllm_omni.diffusion.attention.backends.flash_attn.FlashAttentionBackend");
}

TEST_F(SeedExamples, OverrideByClass) {
  register_diffusion_backend<MyBackend>(Enum::FLASH_ATTN);
  EXPECT_EQ(Enum::FLASH_ATTN.get_path(), "MyBackend");
  EXPECT_EQ(toy_answer(*Enum::FLASH_ATTN.get_class()), 3);
}

TEST_F(SeedExamples, OverrideByDecorator) {
  const auto same = register_diffusion_backend(Enum::FLASH_ATTN)(std::type_identity<vendor::attention::Ascend>{});
  static_assert(std::is_same_v<decltype(same), const std::type_identity<vendor::attention::Ascend>>);
  EXPECT_EQ(Enum::FLASH_ATTN.get_path(), "vendor.attention.Ascend");
  EXPECT_EQ(toy_answer(*Enum::FLASH_ATTN.get_class()), 6);
}

// The generated path finds the class again: nested, anonymous and local ones too.
TEST_F(SeedExamples, ClassesAreFoundAgainByTheirPath) {
  class Local : public testing::ToyBackend {
   public:
    Local() : ToyBackend("LOCAL", 5) {}
  };
  register_diffusion_backend<vendor::attention::Kernels::Nested>(Enum::SAGE_ATTN);
  register_diffusion_backend<vendor::attention::Hidden>(Enum::SAGE_ATTN_3);
  register_diffusion_backend<Local>(Enum::CUDNN_ATTN);
  EXPECT_EQ(Enum::SAGE_ATTN.get_path(), "vendor.attention.Kernels.Nested");
  for (Enum member : {Enum::SAGE_ATTN, Enum::SAGE_ATTN_3, Enum::CUDNN_ATTN}) {
    EXPECT_EQ(resolve_class_path(member.get_path()), member.get_class()) << member.get_path();
  }
  EXPECT_EQ(toy_answer(*Enum::SAGE_ATTN.get_class()), 9);
  EXPECT_EQ(toy_answer(*Enum::SAGE_ATTN_3.get_class()), 12);
  EXPECT_EQ(toy_answer(*Enum::CUDNN_ATTN.get_class()), 15);
}

TEST_F(SeedExamples, DefineAMemberAndRegisterItsClass) {
  const Enum ascend = Enum::define("ASCEND_ATTN");
  EXPECT_EQ(Enum::from_name("ASCEND_ATTN"), ascend);
  EXPECT_THROW(static_cast<void>(ascend.get_class()), ValueError);
  register_diffusion_backend<vendor::attention::Ascend>(ascend);
  EXPECT_EQ(ascend.get_path(), "vendor.attention.Ascend");
  EXPECT_EQ(ascend.get_class()->get_name(), "ASCEND_ATTN");
  EXPECT_EQ(toy_answer(*ascend.get_class()), 6);
}

TEST_F(SeedExamples, CustomByPath) {
  register_backend_class("your.module.YourClass", std::make_shared<MyBackend>());
  register_diffusion_backend(Enum::CUSTOM, "your.module.YourClass");
  EXPECT_EQ(toy_answer(*Enum::CUSTOM.get_class()), 3);
}

}  // namespace
}  // namespace ditattn
