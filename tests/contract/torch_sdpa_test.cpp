// TORCH_SDPA's engines: PyTorch's, where it is there, and the native one.

#include <gtest/gtest.h>

#include "ditattn/ditattn.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;
using tvm::ffi::String;

ImplConfig with_engine(const tvm::ffi::Any& engine) {
  return {.num_heads = 2, .head_size = 8, .backend_kwargs = {{"engine", engine}}};
}

BackendClass torch_sdpa() { return Enum::TORCH_SDPA.get_class(); }
std::string make_error(const tvm::ffi::Any& engine) {
  return error_text<ValueError>([&] { static_cast<void>(torch_sdpa()->make(with_engine(engine))); });
}
bool has_pytorch() { return torch_sdpa()->capabilities().engine.starts_with("aten "); }

TEST(ContractTorchSdpa, EnginesByName) {
  EXPECT_NE(torch_sdpa()->make(with_engine(String("auto"))), nullptr);
  EXPECT_NE(torch_sdpa()->make(with_engine(String("native"))), nullptr);
  EXPECT_EQ(make_error(String("cudnn")),
            "TORCH_SDPA: backend_kwargs['engine'] is 'cudnn'. Valid values are: 'auto', 'aten', 'native'");
  EXPECT_EQ(make_error(3), "TORCH_SDPA: backend_kwargs['engine'] is 3. Valid values are: 'auto', 'aten', 'native'");
}

TEST(ContractTorchSdpa, PyTorchThatIsNotThereIsAnErrorWithTheReason) {
  if (has_pytorch()) GTEST_SKIP() << "skipped: PyTorch is there";
  EXPECT_EQ(torch_sdpa()->capabilities().engine, "native (PyTorch semantics)");
  EXPECT_FALSE(torch_sdpa()->capabilities().masked_nan_propagates);
  expect_contains(make_error(String("aten")),
                  {"backend_kwargs['engine'] is 'aten', but there is no PyTorch to be had (", "libtorch_cpu.so",
                   "Import torch first, put its lib folder on LD_LIBRARY_PATH, or give 'native'."});
}

TEST(ContractTorchSdpa, WhatPyTorchDoesNotTakeIsRefusedOfItAlone) {
  if (!has_pytorch()) GTEST_SKIP() << "skipped: no PyTorch";
  const Tensor ones = empty({1, 4, 2, 8}, kFloat32);
  for (std::int64_t i = 0; i < ones.numel(); ++i) store_element(ones.data_ptr(), i, kFloat32, 1);
  const ForwardOutputs with_lse{.lse = empty({1, 2, 4}, kFloat32)};
  EXPECT_NO_THROW(torch_sdpa()->make(with_engine(String("aten")))->forward(ones, ones, ones));
  expect_contains(error_text<NotImplementedError>([&] {
                    torch_sdpa()->make(with_engine(String("aten")))->forward(ones, ones, ones, {}, with_lse);
                  }),
                  {"TORCH_SDPA: PyTorch does not take this call as it lies", "'native'"});
  EXPECT_NO_THROW(torch_sdpa()->make(with_engine(String("auto")))->forward(ones, ones, ones, {}, with_lse));
}

}  // namespace
}  // namespace ditattn
