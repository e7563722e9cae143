// The class interface: what `make` checks, what the capability questions answer, and `forward` end to end on the toy.

#include "ditattn/backend.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "ditattn/registry.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using testing::counting;
using testing::error_text;
using testing::ToyBackend;

BackendClass toy(Capabilities can = testing::toy_capabilities()) {
  return std::make_shared<ToyBackend>("TOY", 1, std::move(can));
}

TEST(Make, ChecksItsSizes) {
  const BackendClass backend = toy();
  const auto text = [&](const ImplConfig& config) {
    return error_text<ValueError>([&] { return backend->make(config); });
  };
  EXPECT_EQ(text({.num_heads = 0}), "TOY: num_heads=0 is not from 1 to 1048576.");
  EXPECT_EQ(text({.num_heads = -4}), "TOY: num_heads=-4 is not from 1 to 1048576.");
  EXPECT_EQ(text({.num_heads = INT64_MAX}), "TOY: num_heads=9223372036854775807 is not from 1 to 1048576.");
  EXPECT_EQ(text({.head_size = 0}), "TOY: head_size=0 is not from 1 to 65536.");
  EXPECT_EQ(text({.head_size = 65537}), "TOY: head_size=65537 is not from 1 to 65536.");
  EXPECT_EQ(text({.num_heads = 4, .num_kv_heads = 0}), "TOY: num_kv_heads=0 is not from 1 to 1048576.");
}

TEST(Make, QueryHeadsMustBeAMultipleOfKvHeads) {
  const BackendClass backend = toy();
  EXPECT_EQ(error_text<ValueError>([&] { return backend->make({.num_heads = 6, .num_kv_heads = 4}); }),
            "GQA requires query heads to be a multiple of KV heads, got q_heads=6 and kv_heads=4.");
  error_text<ValueError>([&] { return backend->make({.num_heads = 2, .num_kv_heads = 4}); });
  EXPECT_EQ(backend->make({.num_heads = 6, .num_kv_heads = 3})->num_kv_heads(), 3);
}

TEST(Make, ScaleMustBeFinite) {
  const BackendClass backend = toy();
  EXPECT_EQ(
      error_text<ValueError>([&] { return backend->make({.softmax_scale = std::numeric_limits<double>::infinity()}); }),
      "TOY: softmax_scale=inf is not finite.");
  error_text<ValueError>([&] { return backend->make({.softmax_scale = std::nan("")}); });
}

TEST(Make, ScaleDefaultsToOneOverTheRootOfTheHeadSize) {
  EXPECT_EQ(toy()->make({.head_size = 64})->softmax_scale(), 0.125);
  EXPECT_EQ(toy()->make({.head_size = 64, .softmax_scale = 2.})->softmax_scale(), 2);
  EXPECT_EQ(toy()->make({.softmax_scale = -1.5})->softmax_scale(), -1.5);
  EXPECT_EQ(toy()->make({.num_heads = 8})->num_kv_heads(), 8);
}

TEST(Make, UnknownKwargsAreOneWarning) {
  testing::LogRecorder log;
  const BackendKwargs kwargs = {{"zeta", 1}, {"known", true}, {"alpha", tvm::ffi::String("x")}};
  static_cast<void>(toy()->make({.backend_kwargs = kwargs}));
  EXPECT_EQ(log.of(LogLevel::warning), std::vector<std::string>{"TOY ignoring backend_kwargs: ['alpha', 'zeta']"});
  static_cast<void>(toy()->make({.backend_kwargs = {{"known", 1}}}));
  EXPECT_EQ(log.entries.size(), 1U);
}

TEST(Make, ImplementationKnowsItsClassAndKeepsItAlive) {
  BackendClass backend = toy();
  const auto attention = backend->make({.num_heads = 2, .prefix = "blocks.0.attn"});
  EXPECT_EQ(&attention->backend(), backend.get());
  EXPECT_EQ(attention->config().prefix, "blocks.0.attn");
  backend.reset();
  EXPECT_EQ(attention->backend().get_name(), "TOY");
}

TEST(GetImplCls, IsAFactoryThatKeepsItsClassAlive) {
  const ImplFactory factory = toy()->get_impl_cls();
  const auto attention = factory({.num_heads = 3, .head_size = 5});
  EXPECT_EQ(attention->config().num_heads, 3);
  error_text<ValueError>([&] { return factory({.num_heads = 0}); });
}

TEST(SupportedHeadSizes, EmptyMeansAny) {
  EXPECT_TRUE(toy()->get_supported_head_sizes().empty());
  EXPECT_TRUE(toy()->supports_head_size(72));
}

TEST(SupportedHeadSizes, ListsAndRanges) {
  Capabilities can = testing::toy_capabilities();
  can.head_sizes.list = {64, 128, 256};
  EXPECT_EQ(toy(can)->get_supported_head_sizes(), (std::vector<std::int64_t>{64, 128, 256}));
  EXPECT_FALSE(toy(can)->supports_head_size(72));
  can.head_sizes = {.list = {}, .min = 8, .max = 32, .multiple = 8};
  EXPECT_EQ(toy(can)->get_supported_head_sizes(), (std::vector<std::int64_t>{8, 16, 24, 32}));
}

// Plug-ins may say anything; layers have at most 2^16.
TEST(SupportedHeadSizes, RangesWithoutEndAreThoseOfLayers) {
  Capabilities can = testing::toy_capabilities();
  can.head_sizes = {.list = {}, .min = INT64_MIN, .max = INT64_MAX, .multiple = 1 << 14};
  EXPECT_EQ(toy(can)->get_supported_head_sizes(), (std::vector<std::int64_t>{1 << 14, 2 << 14, 3 << 14, 4 << 14}));
}

TEST(SupportsAttentionMask, WhereAnyKindIs) {
  Capabilities can = testing::toy_capabilities();
  for (const char* kind : {"padding", "bool", "additive"}) {
    can.masks = {kind};
    EXPECT_TRUE(toy(can)->supports_attention_mask()) << kind;
    EXPECT_FALSE(toy(can)->supports_piecewise_spans()) << kind;
  }
  can.masks = {"spans"};
  EXPECT_FALSE(toy(can)->supports_attention_mask());
  EXPECT_TRUE(toy(can)->supports_piecewise_spans());
}

TEST(Forward, GivesANewContiguousTensor) {
  const auto attention = toy()->make({.num_heads = 2, .head_size = 3});
  const Tensor out = attention->forward(counting({1, 5, 2, 3}), counting({1, 4, 2, 3}), counting({1, 4, 2, 3}));
  EXPECT_EQ(shape_name(out), "(1, 5, 2, 3)");
  EXPECT_TRUE(out.IsContiguous());
  // V of head h, element d, key j is 6j + 3h + d: mean 9 + 3h + d.
  for (int i = 0; i < 30; ++i) EXPECT_EQ(load_element(data_pointer(out), i, kFloat32), 9 + i % 6);
}

TEST(Forward, WritesToWhatTheCallerGives) {
  const auto attention = toy()->make({.num_heads = 1, .head_size = 1});
  const Tensor out = empty({1, 2, 1, 1}, kFloat32);
  const Tensor lse = empty({1, 1, 2}, kFloat32);
  const Tensor given = attention->forward(counting({1, 2, 1, 1}), counting({1, 4, 1, 1}), counting({1, 4, 1, 1}), {},
                                          {.out = out, .lse = lse});
  EXPECT_EQ(data_pointer(given), data_pointer(out));
  EXPECT_EQ(load_element(data_pointer(out), 1, kFloat32), 1.5);
  EXPECT_FLOAT_EQ(static_cast<float>(load_element(data_pointer(lse), 0, kFloat32)), std::log(4.F));
}

TEST(Forward, SharesKvHeadsAmongQueryHeads) {
  const auto attention = toy()->make({.num_heads = 4, .head_size = 1, .num_kv_heads = 2});
  const Tensor out = attention->forward(counting({1, 1, 4, 1}), counting({1, 2, 2, 1}), counting({1, 2, 2, 1}));
  for (int h = 0; h < 4; ++h) EXPECT_EQ(load_element(data_pointer(out), h, kFloat32), 1 + h / 2) << "head " << h;
}

TEST(Forward, WithoutQueriesThereIsNothingToDo) {
  const auto attention = toy()->make({.num_heads = 1, .head_size = 4});
  const Tensor out =
      attention->forward(empty({2, 0, 1, 4}, kFloat32), empty({2, 3, 1, 4}, kFloat32), empty({2, 3, 1, 4}, kFloat32));
  EXPECT_EQ(shape_name(out), "(2, 0, 1, 4)");
}

TEST(Forward, RefusesWhatTheClassCannotDoAndWritesNothing) {
  Capabilities can = testing::toy_capabilities();
  can.dtypes = {kBFloat16};
  const auto attention = toy(can)->make({.num_heads = 1, .head_size = 1});
  const Tensor out = counting({1, 1, 1, 1}, kFloat32, 42);
  const Tensor input = counting({1, 1, 1, 1});
  const std::string text = error_text<ValueError>([&] {
    return attention->forward(input, counting({1, 1, 1, 1}), counting({1, 1, 1, 1}), {}, {.out = out});
  });
  testing::expect_contains(text, {"TOY does not support dtype=float32. Supported dtypes: bfloat16."});
  EXPECT_EQ(load_element(data_pointer(out), 0, kFloat32), 42);
}

TEST(Forward, RefusalNamesABackendThatWouldDo) {
  Capabilities can = testing::toy_capabilities();
  can.head_sizes.list = {64};
  register_diffusion_backend<ToyBackend>(DiffusionAttentionBackendEnum::FLASH_ATTN);
  const auto attention = toy(can)->make({.num_heads = 1, .head_size = 1});
  const Tensor one = counting({1, 1, 1, 1});
  EXPECT_EQ(error_text<ValueError>([&] { return attention->forward(one, one, one); }),
            "TOY does not support head_size=1. Supported head sizes: 64. FLASH_ATTN would do.");
  DiffusionAttentionBackendEnum::FLASH_ATTN.clear_override();
}

TEST(Forward, ManyThreadsShareOneImplementation) {
  const auto attention = toy()->make({.num_heads = 1, .head_size = 1});
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const Tensor value = counting({1, 3, 1, 1}, kFloat32, t);
        const Tensor out = attention->forward(counting({1, 1, 1, 1}), value, value);
        EXPECT_EQ(load_element(data_pointer(out), 0, kFloat32), t + 1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace ditattn
