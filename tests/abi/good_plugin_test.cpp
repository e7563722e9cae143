// A plug-in made of <ditattn/plugin.hpp> alone: found by its dotted path, whole through the table, errors included.

#include <gtest/gtest.h>

#include <filesystem>
#include <thread>

#include "ditattn/registry.hpp"
#include "tests/abi/plugin_fixture.hpp"
#include "tests/abi/plugins/good_backends.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_doubles;
using testing::forward_doubler;

class GoodPlugin : public testing::PluginTest {};

TEST_F(GoodPlugin, LoadsUnderItsDottedPath) {
  expect_doubles(*resolve_class_path("zoo.good.Doubler"));
  expect_doubles(*resolve_class_path("zoo.deep.er.good.Doubler"));
}

TEST_F(GoodPlugin, ThroughCustomAnOverrideAndADefinedMember) {
  register_diffusion_backend(Enum::CUSTOM, "zoo.good.Doubler");
  expect_doubles(*Enum::CUSTOM.get_class());
  register_diffusion_backend(Enum::FLASH_ATTN, "zoo.good.Doubler");
  EXPECT_EQ(Enum::FLASH_ATTN.get_class(), Enum::CUSTOM.get_class());
  const Enum member = Enum::define("ABI_TEST_MEMBER", "zoo.deep.er.good.Doubler");
  EXPECT_EQ(member.get_path(false), "zoo.deep.er.good");
  expect_doubles(*member.get_class());
}

TEST_F(GoodPlugin, IsLoadedOnceForAllItsClasses) {
  EXPECT_EQ(resolve_class_path("zoo.good.Doubler"), resolve_class_path("zoo.good.Doubler"));
  EXPECT_NE(resolve_class_path("zoo.good.Doubler"), resolve_class_path("zoo.good.Odd"));
}

TEST_F(GoodPlugin, RegistrationLoadsNothing) {
  register_diffusion_backend(Enum::CUSTOM, late_module() + ".Doubler");
  EXPECT_EQ(Enum::CUSTOM.get_path(), late_module() + ".Doubler");
  install_late();  // only now is there anything to load
  expect_doubles(*Enum::CUSTOM.get_class());
}

TEST_F(GoodPlugin, CapabilitiesCrossTheTableUnchanged) {
  const Capabilities can = resolve_class_path("zoo.good.Odd")->capabilities();
  const Capabilities expected = odd_capabilities();
  EXPECT_EQ(can.engine, expected.engine);
  EXPECT_EQ(can.devices, expected.devices);
  EXPECT_EQ(can.dtypes, expected.dtypes);
  EXPECT_EQ(can.head_sizes.list, expected.head_sizes.list);
  EXPECT_EQ(can.head_sizes.min, expected.head_sizes.min);
  EXPECT_EQ(can.head_sizes.max, expected.head_sizes.max);
  EXPECT_EQ(can.head_sizes.multiple, expected.head_sizes.multiple);
  EXPECT_EQ(can.masks, expected.masks);
  EXPECT_EQ(can.gqa, expected.gqa);
  EXPECT_EQ(can.causal, expected.causal);
  EXPECT_EQ(can.causal_alignment, expected.causal_alignment);
  EXPECT_EQ(can.lse, expected.lse);
  EXPECT_EQ(can.graph_safe, expected.graph_safe);
  EXPECT_EQ(can.masked_nan_propagates, expected.masked_nan_propagates);

  const Capabilities plain = resolve_class_path("zoo.good.Doubler")->capabilities();
  EXPECT_TRUE(plain.head_sizes.any());
  EXPECT_FALSE(plain.gqa || plain.causal || plain.graph_safe || plain.masked_nan_propagates);
  EXPECT_EQ(plain.causal_alignment, CausalAlignment::bottom_right);
}

TEST_F(GoodPlugin, ExplainsWithItsOwnReasons) {
  const BackendClass backend = resolve_class_path("zoo.good.Odd");
  EXPECT_TRUE(backend->explain({.seq_kv = 2}));
  EXPECT_EQ(backend->explain({.seq_kv = 1}).reasons,
            (std::vector<std::string>{"one key is too few", "and so is one reason"}));
}

TEST_F(GoodPlugin, NamesItsKernel) {
  EXPECT_EQ(resolve_class_path("zoo.good.Odd")->kernel_name({.seq_kv = 2}), "odd kernel of 2");
  EXPECT_EQ(resolve_class_path("zoo.good.Doubler")->kernel_name({.seq_kv = 2}), "");
}

TEST_F(GoodPlugin, ConfigMaskAndLseReachTheKernel) {
  const BackendClass backend = resolve_class_path("zoo.good.Doubler");
  const auto attention = backend->make({.num_heads = 2, .head_size = 2, .softmax_scale = 0.5});
  const Tensor lse = empty({1, 2, 4}, kFloat32);
  EXPECT_EQ(load_element(data_pointer(forward_doubler(*attention, {}, {.lse = lse})), 0, kFloat32), 2.5);
  EXPECT_EQ(load_element(data_pointer(lse), 0, kFloat32), -1) << "no mask to be read";
  const Tensor mask = empty({1, 1, 1, 3}, kBool);
  for (int key = 0; key < 3; ++key) store_element(data_pointer(mask), key, kBool, key != 1);
  forward_doubler(*attention, AttentionMetadata({.attn_mask = mask}), {.lse = lse});
  EXPECT_EQ(load_element(data_pointer(lse), 0, kFloat32), 1) << "a dense mask to be read";
  EXPECT_EQ(&attention->backend(), backend.get());
}

TEST_F(GoodPlugin, UnknownKwargsAreWarnedAboutOnce) {
  const testing::LogRecorder log;
  const auto attention =
      resolve_class_path("zoo.good.Doubler")
          ->make({.num_heads = 2, .head_size = 2, .backend_kwargs = {{"fail", tvm::ffi::String("")}, {"speed", 9}}});
  EXPECT_EQ(log.of(LogLevel::warning), std::vector<std::string>{"DOUBLER ignoring backend_kwargs: ['speed']"});
  forward_doubler(*attention);
  EXPECT_EQ(log.entries.size(), 1U);
}

// What the plug-in throws in `run`, as the caller of forward gets it.
template <class Expected>
std::string error_in_run(const char* what) {
  const auto attention =
      resolve_class_path("zoo.good.Doubler")
          ->make({.num_heads = 2, .head_size = 2, .backend_kwargs = {{"fail", tvm::ffi::String(what)}}});
  return error_text<Expected>([&] { return forward_doubler(*attention); });
}

// The same while the implementation is made.
template <class Expected>
std::string error_in_make(const char* what) {
  return error_text<Expected>(
      [&] { return resolve_class_path("zoo.good.Doubler")->make({.num_heads = 2, .head_size = 2, .prefix = what}); });
}

TEST_F(GoodPlugin, ErrorsKeepTheirTypeAndText) {
  EXPECT_EQ(error_in_run<ValueError>("ValueError"), "a wrong value");
  EXPECT_EQ(error_in_run<ImportError>("ImportError"), "a missing library");
  EXPECT_EQ(error_in_run<NotImplementedError>("NotImplementedError"), "not on this chip");
  EXPECT_EQ(error_in_run<MemoryError>("MemoryError"), "too large by 1 byte");
  EXPECT_EQ(error_in_make<ValueError>("ValueError"), "a wrong value");
  EXPECT_EQ(error_in_make<ImportError>("ImportError"), "a missing library");
  EXPECT_EQ(error_in_make<NotImplementedError>("NotImplementedError"), "not on this chip");
  EXPECT_EQ(error_in_run<Error>("KeyError"), "no such key");
}

TEST_F(GoodPlugin, WhateverElseIsThrownIsAnError) {
  EXPECT_NE(error_in_run<Error>("runtime_error").find("a plain C++ exception"), std::string::npos);
  EXPECT_NE(error_in_make<Error>("runtime_error").find("a plain C++ exception"), std::string::npos);
  EXPECT_NE(error_in_run<Error>("int").find("something that is not a std::exception"), std::string::npos);
  EXPECT_NE(error_in_make<Error>("int").find("something that is not a std::exception"), std::string::npos);
}

TEST_F(GoodPlugin, UnavailabilityComesWithItsReason) {
  EXPECT_EQ(error_text<ImportError>([] { resolve_class_path("zoo.good.NoLibrary")->validate_available(); }),
            "a missing library");
  testing::expect_contains(
      error_text<Error>([] { resolve_class_path("zoo.good.ThrowsRuntimeError")->validate_available(); }),
      {"a plain C++ exception"});
  testing::expect_contains(error_text<Error>([] { resolve_class_path("zoo.good.ThrowsInt")->validate_available(); }),
                           {"not a std::exception"});
}

TEST_F(GoodPlugin, LinkedInItIsFoundUnderTheSamePath) {
  link_backend_module("zoo.linked", &find_good);
  expect_doubles(*resolve_class_path("zoo.linked.Doubler"));
  EXPECT_EQ(resolve_class_path("zoo.linked.Odd")->capabilities().head_sizes.list, odd_capabilities().head_sizes.list);
  testing::expect_contains(import_error("zoo.linked.Nobody"), {"linked into this process", "'Nobody'"});
}

TEST_F(GoodPlugin, LinkedInItComesBeforeItsFile) {
  link_backend_module("zoo.deep.er.good", [](std::string_view) -> BackendClass { return find_good("Odd"); });
  EXPECT_EQ(resolve_class_path("zoo.deep.er.good.AnyName")->capabilities().engine, odd_capabilities().engine);
}

TEST_F(GoodPlugin, MayRegisterClassesWhileItIsLoaded) {
  EXPECT_EQ(resolve_class_path("zoo.registers_while_loading.Doubler")->get_name(), "DOUBLER");
  EXPECT_EQ(resolve_class_path("abi.registered_while_loading.Doubler")->get_name(), "DOUBLER");
}

TEST_F(GoodPlugin, ManyThreadsLoadAtOnce) {
  std::vector<BackendClass> seen(16);
  std::vector<std::thread> threads;
  for (BackendClass& backend : seen) {
    threads.emplace_back([&backend] {
      backend = resolve_class_path("zoo.good.Doubler");
      expect_doubles(*backend);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const BackendClass& backend : seen) EXPECT_EQ(backend, seen[0]);
}

}  // namespace
}  // namespace ditattn
