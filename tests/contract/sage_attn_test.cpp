// SAGE_ATTN: its options, on the CPU what it refuses, and that more bits are nearer to FLASH_ATTN.

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "ditattn/ditattn.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::expect_contains;

constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kSize = 64;
constexpr std::int64_t kTokens = 300;

Tensor random_tensor(std::uint64_t seed) {
  Tensor tensor = empty({1, kTokens, kHeads, kSize}, kFloat32);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, kFloat32, normal(generator));
  return tensor;
}

Tensor forward(const Enum& member, const BackendKwargs& kwargs, const AttentionMetadataFields& fields = {}) {
  return member.get_class()
      ->make({.num_heads = kHeads, .head_size = kSize, .backend_kwargs = kwargs})
      ->forward(random_tensor(1), random_tensor(2), random_tensor(3), AttentionMetadata(fields));
}

std::string bad_options(const BackendKwargs& kwargs) {
  return error_text<ValueError>(
      [&] { return Enum::SAGE_ATTN.get_class()->make({.num_heads = 1, .head_size = 8, .backend_kwargs = kwargs}); });
}

// ‖a − b‖ / ‖b‖
double relative_difference(const Tensor& a, const Tensor& b) {
  double far = 0;
  double norm = 0;
  for (std::int64_t i = 0; i < a.numel(); ++i) {
    const double expected = load_element(data_pointer(b), i, kFloat32);
    far += std::pow(load_element(data_pointer(a), i, kFloat32) - expected, 2);
    norm += expected * expected;
  }
  return std::sqrt(far / norm);
}

TEST(ContractSageAttn, BadOptionsAreValueErrorsThatSayWhatIsAllowed) {
  expect_contains(bad_options({{"pv", tvm::ffi::String("fp4")}}),
                  {"SAGE_ATTN: backend_kwargs['pv'] is 'fp4'", "\"fp8\"", "\"int8\"", "\"fp16\""});
  expect_contains(bad_options({{"pv", 8}}), {"backend_kwargs['pv'] is 8.", "\"int8\"", "\"fp16\""});
  expect_contains(bad_options({{"pv", true}}), {"backend_kwargs['pv'] is true."});
  expect_contains(bad_options({{"pv", 0.5}}), {"backend_kwargs['pv'] is 0.5."});
  expect_contains(bad_options({{"pv", nullptr}}), {"backend_kwargs['pv'] is None."});
  expect_contains(bad_options({{"smooth_k", tvm::ffi::String("yes")}}),
                  {"SAGE_ATTN: backend_kwargs['smooth_k'] is 'yes', not a boolean", "true", "false"});
  expect_contains(bad_options({{"smooth_v", tvm::ffi::String("on")}}),
                  {"backend_kwargs['smooth_v'] is 'on', not a boolean"});
  expect_contains(bad_options({{"qk", tvm::ffi::String("fp4")}}),
                  {"backend_kwargs['qk'] is 'fp4'", "\"int8\"", "\"fp8\""});
  expect_contains(bad_options({{"granularity", tvm::ffi::String("per_block")}}),
                  {"backend_kwargs['granularity'] is 'per_block'", "\"per_thread\"", "\"per_warp\""});
}

TEST(ContractSageAttn, OptionsOfGpusAreRefusedOnTheCpu) {
  const auto refused = [](const BackendKwargs& kwargs) {
    return error_text<ValueError>([&] { forward(Enum::SAGE_ATTN, kwargs); });
  };
  EXPECT_EQ(
      refused({{"pv", tvm::ffi::String("fp8")}}),
      "SAGE_ATTN: backend_kwargs['pv'] is \"fp8\", which there is not on the CPU. It is \"int8\" or \"fp16\" there.");
  expect_contains(refused({{"granularity", tvm::ffi::String("per_warp")}}), {"['granularity']", "on the CPU"});
  expect_contains(refused({{"smooth_v", true}}), {"['smooth_v']", "on the CPU"});
  expect_contains(refused({{"qk", tvm::ffi::String("fp8")}}), {"['qk']", "on the CPU", "\"int8\""});
}

TEST(ContractSageAttn, UnknownOptionsAreWarnedAboutOnce) {
  const testing::LogRecorder log;
  static_cast<void>(Enum::SAGE_ATTN.get_class()->make(
      {.num_heads = 1,
       .head_size = 8,
       .backend_kwargs = {{"zeta", 1}, {"pv", tvm::ffi::String("int8")}, {"smooth_k", false}, {"alpha", 2}}}));
  EXPECT_EQ(log.of(LogLevel::warning),
            std::vector<std::string>{"SAGE_ATTN ignoring backend_kwargs: ['alpha', 'zeta']"});
}

TEST(ContractSageAttn, MoreBitsOfVAreNearerToFlashAttn) {
  const Tensor exact = forward(Enum::FLASH_ATTN, {});
  const double bytes = relative_difference(forward(Enum::SAGE_ATTN, {{"pv", tvm::ffi::String("int8")}}), exact);
  const double halves = relative_difference(forward(Enum::SAGE_ATTN, {{"pv", tvm::ffi::String("fp16")}}), exact);
  RecordProperty("int8", std::to_string(bytes));
  RecordProperty("fp16", std::to_string(halves));
  EXPECT_LT(halves, bytes);
  EXPECT_GT(halves, 1e-5) << "Q and K are quantized";
  EXPECT_LT(bytes, 0.03);
}

TEST(ContractSageAttn, DenseMasksAreRefusedAndAnotherBackendIsNamed) {
  for (const DLDataType dtype : {kBool, kFloat32}) {
    const double kept = dtype.code == kBool.code ? 1 : 0.5;
    Tensor mask = empty({1, 1, kTokens, kTokens}, dtype);
    for (std::int64_t i = 0; i < mask.numel(); ++i) store_element(mask.data_ptr(), i, dtype, i % 3 == 0 ? kept : 0);
    const std::string kind = dtype.code == kBool.code ? "bool" : "additive";
    EXPECT_EQ(error_text<ValueError>([&] { forward(Enum::SAGE_ATTN, {}, {.attn_mask = mask}); }),
              "SAGE_ATTN does not support a mask of kind " + kind +
                  ". Supported kinds: padding, spans. FLASH_ATTN would do.");
  }
}

}  // namespace
}  // namespace ditattn
