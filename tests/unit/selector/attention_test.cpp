// Attention in one call: which layer computes, that it is kept, and when it is chosen anew.

#include "ditattn/attention.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

#include "ditattn/selector.hpp"
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

class AttentionCall : public testing::RegistryTest {
 protected:
  void SetUp() override {
    use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>("FIRST"));
    use(Enum::TORCH_SDPA, std::make_shared<ToyBackend>("SECOND"));
  }
  static std::string chosen(const AttentionOptions& options) {
    return attention_layer(options, {.head_size = 8})->backend().get_name();
  }

  static Tensor zeros(std::initializer_list<std::int64_t> shape) {
    const Tensor tensor = empty(shape, kFloat32);
    std::fill_n(static_cast<float*>(tensor.data_ptr()), tensor.numel(), 0.0F);
    return tensor;
  }

  const ScopedEnvironment unset_{"DIFFUSION_ATTENTION_BACKEND", nullptr};
};

TEST_F(AttentionCall, NamesInAnyCaseAndAuto) {
  EXPECT_EQ(chosen({.backend = "torch_sdpa"}), "SECOND");
  EXPECT_EQ(chosen({.backend = "Flash_Attn"}), "FIRST");
  EXPECT_EQ(chosen({.backend = "AUTO"}), chosen({}));
  EXPECT_EQ(chosen({.backend = "FLASH_ATTN", .backend_class = std::make_shared<ToyBackend>("THIRD")}), "THIRD");
  expect_contains(error_text<ValueError>([] { chosen({.backend = "abacus"}); }),
                  {"'ABACUS'", "FLASH_ATTN, TORCH_SDPA"});
}

TEST_F(AttentionCall, AutoAsksTheRoleInTheConfiguration) {
  const AttentionConfig config =
      AttentionConfig::from_json(R"({"default": "FLASH_ATTN", "per_role": {"cross": {"backend": "TORCH_SDPA"}}})");
  EXPECT_EQ(chosen({.role = "self", .config = config}), "FIRST");
  EXPECT_EQ(chosen({.role = "cross", .config = config}), "SECOND");
  EXPECT_EQ(chosen({.role = "other", .role_category = "cross", .config = config}), "SECOND");
}

TEST_F(AttentionCall, TheEnvironmentIsAskedAtEachCall) {
  for (const char* name : {"TORCH_SDPA", "flash_attn", "TORCH_SDPA"}) {
    const ScopedEnvironment set("DIFFUSION_ATTENTION_BACKEND", name);
    EXPECT_EQ(chosen({}), std::string(name) == "TORCH_SDPA" ? "SECOND" : "FIRST");
  }
}

TEST_F(AttentionCall, LayersAreKeptWhileNothingChanges) {
  const LayerShape shape{.num_heads = 4, .num_kv_heads = 2, .head_size = 8};
  const auto first = attention_layer({.backend = "FLASH_ATTN", .backend_kwargs = {{"a", 1}}}, shape);
  EXPECT_EQ(attention_layer({.backend = "FLASH_ATTN", .backend_kwargs = {{"a", 1}}}, shape), first);
  EXPECT_EQ(first->config().num_heads, 4);
  EXPECT_EQ(first->num_kv_heads(), 2);

  const AttentionOptions different[] = {{.backend = "FLASH_ATTN"},
                                        {.backend = "FLASH_ATTN", .backend_kwargs = {{"a", true}}},
                                        {.backend = "FLASH_ATTN", .backend_kwargs = {{"a", 1.0}}},
                                        {.backend = "FLASH_ATTN", .backend_kwargs = {{"a", "1"}}},
                                        {.backend = "FLASH_ATTN", .backend_kwargs = {{"a", 1}, {"b", 1}}},
                                        {.backend = "FLASH_ATTN", .causal = true, .backend_kwargs = {{"a", 1}}},
                                        {.backend = "FLASH_ATTN", .softmax_scale = 2.0, .backend_kwargs = {{"a", 1}}},
                                        {.backend = "TORCH_SDPA", .backend_kwargs = {{"a", 1}}}};
  std::vector<std::shared_ptr<const AttentionImpl>> layers{first};
  for (const AttentionOptions& options : different) {
    const auto layer = attention_layer(options, shape);
    EXPECT_EQ(std::ranges::count(layers, layer), 0);
    layers.push_back(layer);
  }
  for (const LayerShape& other : {LayerShape{.num_heads = 2, .num_kv_heads = 2, .head_size = 8},
                                  LayerShape{.num_heads = 4, .num_kv_heads = 4, .head_size = 8},
                                  LayerShape{.num_heads = 4, .num_kv_heads = 2, .head_size = 16}}) {
    EXPECT_NE(attention_layer({.backend = "FLASH_ATTN", .backend_kwargs = {{"a", 1}}}, other), first);
  }

  use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>("NEW"));
  EXPECT_EQ(attention_layer({.backend = "FLASH_ATTN", .backend_kwargs = {{"a", 1}}}, shape)->backend().get_name(),
            "NEW");
}

TEST_F(AttentionCall, APlatformThatChangesIsSeen) {
  EXPECT_EQ(chosen({}), "FIRST");
  define_platform("cpu", {Enum::TORCH_SDPA});
  EXPECT_EQ(chosen({}), "SECOND");
  define_platform("cpu", {Enum::FLASH_ATTN, Enum::TORCH_SDPA});  // as it was
  EXPECT_EQ(chosen({}), "FIRST");
}

TEST_F(AttentionCall, KeepsABoundedNumber) {
  const std::weak_ptr<const AttentionImpl> first = attention_layer({.softmax_scale = 0.5}, {.head_size = 8});
  EXPECT_FALSE(first.expired());
  for (int i = 1; i < 2000; ++i) attention_layer({.softmax_scale = i}, {.head_size = 8});
  EXPECT_TRUE(first.expired());
}

TEST_F(AttentionCall, ManyThreadsWhileRegistrationsChange) {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([] {
      for (int i = 0; i < 500; ++i) {
        const std::string name = chosen({.backend = "FLASH_ATTN", .softmax_scale = i % 7});
        EXPECT_TRUE(name == "FIRST" || name == "OTHER") << name;
      }
    });
  }
  for (int i = 0; i < 50; ++i) use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>(i % 2 == 0 ? "OTHER" : "FIRST"));
  for (std::thread& thread : threads) thread.join();
}

TEST_F(AttentionCall, ComputesAsTheLayerDoes) {
  const Tensor query = zeros({1, 3, 4, 8});
  const Tensor key = zeros({1, 2, 2, 8});
  const Tensor value = zeros({1, 2, 2, 8});
  for (std::int64_t i = 0; i < value.numel(); ++i) static_cast<float*>(value.data_ptr())[i] = static_cast<float>(i);
  const Tensor out = zeros({1, 3, 4, 8});
  EXPECT_TRUE(attention(query, key, value, {}, {}, {.out = out}).same_as(out));
  const auto* result = static_cast<const float*>(out.data_ptr());
  EXPECT_EQ(result[0], 8);       // head 0: the mean of 0 and 16
  EXPECT_EQ(result[3 * 8], 16);  // head 3 reads the second head of V: the mean of 8 and 24
  EXPECT_EQ(static_cast<const float*>(attention(query, key, value).data_ptr())[3 * 8], 16);
}

TEST_F(AttentionCall, RefusesTensorsItCannotReadSizesOff) {
  const Tensor good = zeros({1, 3, 4, 8});
  const Tensor flat = zeros({3, 32});
  expect_contains(error_text<ValueError>([&] { attention(flat, good, good); }),
                  {"query must have 4 dimensions", "(3, 32)"});
  expect_contains(error_text<ValueError>([&] { attention(good, flat, good); }), {"key must have 4 dimensions"});
  expect_contains(error_text<ValueError>([&] { attention({}, good, good); }), {"query"});
}

}  // namespace
}  // namespace ditattn
