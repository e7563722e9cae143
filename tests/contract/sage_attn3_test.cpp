// SAGE_ATTN_3: its options, what it refuses, and what means that are taken off are worth.

#include <gtest/gtest.h>

#include <algorithm>
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

// Random normals, of which each channel is `shift` off, to its own side.
Tensor random_tensor(std::uint64_t seed, double shift, std::int64_t heads = kHeads) {
  Tensor tensor = empty({1, kTokens, heads, kSize}, kFloat32);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.numel(); ++i) {
    store_element(tensor.data_ptr(), i, kFloat32, normal(generator) + (i % 4 == 0 ? shift : -shift));
  }
  return tensor;
}

// Q, K and V whose channels have means, where asked for.
struct Inputs {
  double shift_q = 0, shift_k = 0, shift_v = 0;
  Tensor query = random_tensor(1, shift_q), key = random_tensor(2, shift_k), value = random_tensor(3, shift_v);

  struct Result {
    Tensor out, lse;
  };
  [[nodiscard]] Result forward(const Enum& member, const ImplConfig& config,
                               const AttentionMetadataFields& fields = {}) const {
    Result result{.out = empty({1, kTokens, kHeads, kSize}, kFloat32), .lse = empty({1, kHeads, kTokens}, kFloat32)};
    member.get_class()->make(config)->forward(query, key, value, AttentionMetadata(fields),
                                              {.out = result.out, .lse = result.lse});
    return result;
  }
};

ImplConfig options(const BackendKwargs& kwargs) {
  return {.num_heads = kHeads, .head_size = kSize, .backend_kwargs = kwargs};
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

double largest_difference(const Tensor& a, const Tensor& b) {
  double largest = 0;
  for (std::int64_t i = 0; i < a.numel(); ++i) {
    largest = std::max(
        largest, std::abs(load_element(data_pointer(a), i, kFloat32) - load_element(data_pointer(b), i, kFloat32)));
  }
  return largest;
}

TEST(ContractSageAttn3, BadOptionsAreValueErrorsThatSayWhatIsAllowed) {
  const auto bad = [](const BackendKwargs& kwargs) {
    return error_text<ValueError>([&] { return Enum::SAGE_ATTN_3.get_class()->make(options(kwargs)); });
  };
  EXPECT_EQ(bad({{"smooth_q", tvm::ffi::String("yes")}}),
            "SAGE_ATTN_3: backend_kwargs['smooth_q'] is 'yes', not a boolean: true or false.");
  expect_contains(bad({{"smooth_k", nullptr}}), {"SAGE_ATTN_3: backend_kwargs['smooth_k'] is None, not a boolean"});
  expect_contains(bad({{"smooth_v", 0.5}}), {"backend_kwargs['smooth_v'] is 0.5, not a boolean"});
  expect_contains(bad({{"num_threads", 0}}), {"SAGE_ATTN_3", "num_threads", "from 1"});
}

TEST(ContractSageAttn3, UnknownOptionsAreWarnedAboutOnce) {
  const testing::LogRecorder log;
  static_cast<void>(Enum::SAGE_ATTN_3.get_class()->make(options(
      {{"zeta", 1}, {"smooth_q", true}, {"smooth_k", false}, {"smooth_v", true}, {"pv", tvm::ffi::String("int8")}})));
  EXPECT_EQ(log.of(LogLevel::warning), std::vector<std::string>{"SAGE_ATTN_3 ignoring backend_kwargs: ['pv', 'zeta']"});
}

TEST(ContractSageAttn3, SmoothingIsOnUnlessItIsTurnedOff) {
  const Inputs inputs{.shift_q = 1, .shift_k = 1, .shift_v = 1};
  const Tensor as_it_is = inputs.forward(Enum::SAGE_ATTN_3, options({})).out;
  for (const char* option : {"smooth_q", "smooth_k", "smooth_v"}) {
    EXPECT_EQ(largest_difference(inputs.forward(Enum::SAGE_ATTN_3, options({{option, true}})).out, as_it_is), 0);
    EXPECT_GT(largest_difference(inputs.forward(Enum::SAGE_ATTN_3, options({{option, false}})).out, as_it_is), 0);
  }
}

TEST(ContractSageAttn3, SmoothingIsNearerToFlashAttnWhereChannelsHaveMeans) {
  const std::pair<const char*, Inputs> cases[] = {
      {"smooth_q", {.shift_q = 4}}, {"smooth_k", {.shift_k = 4}}, {"smooth_v", {.shift_v = 4}}};
  for (const auto& [option, inputs] : cases) {
    const Tensor exact = inputs.forward(Enum::FLASH_ATTN, options({})).out;
    const double with = relative_difference(inputs.forward(Enum::SAGE_ATTN_3, options({})).out, exact);
    const double without =
        relative_difference(inputs.forward(Enum::SAGE_ATTN_3, options({{option, false}})).out, exact);
    RecordProperty(std::string(option) + "_on", std::to_string(with));
    RecordProperty(std::string(option) + "_off", std::to_string(without));
    EXPECT_LT(with, 0.75 * without) << option;
    EXPECT_GT(with, 1e-3) << "it has four bits";
    EXPECT_LT(with, 0.4) << option;
  }
}

// What smoothing takes off the logits is in the log-sum-exp again.
TEST(ContractSageAttn3, LseIsThatOfTheTrueLogits) {
  const Inputs inputs{.shift_q = 1, .shift_k = 4};
  const Tensor exact = inputs.forward(Enum::FLASH_ATTN, options({})).lse;
  EXPECT_GT(std::abs(load_element(data_pointer(exact), 0, kFloat32) - std::log(kTokens)), 1) << "a mean that counts";
  EXPECT_LT(largest_difference(inputs.forward(Enum::SAGE_ATTN_3, options({})).lse, exact), 0.3);
}

TEST(ContractSageAttn3, TakesGqaAndAnyScale) {
  const Inputs inputs{.key = random_tensor(2, 0, 1), .value = random_tensor(3, 0, 1)};
  const ImplConfig config{
      .num_heads = kHeads, .head_size = kSize, .softmax_scale = 0.05, .causal = true, .num_kv_heads = 1};
  const Inputs::Result exact = inputs.forward(Enum::FLASH_ATTN, config);
  const Inputs::Result found = inputs.forward(Enum::SAGE_ATTN_3, config);
  EXPECT_LT(relative_difference(found.out, exact.out), 0.25);
  EXPECT_EQ(largest_difference(inputs.key, random_tensor(2, 0, 1)), 0) << "K is only read";
  EXPECT_LT(largest_difference(found.lse, exact.lse), 0.3);
}

TEST(ContractSageAttn3, DenseMasksAreRefusedAndAnotherBackendIsNamed) {
  for (const DLDataType dtype : {kBool, kFloat32}) {
    const double kept = dtype.code == kBool.code ? 1 : 0.5;
    Tensor mask = empty({1, 1, kTokens, kTokens}, dtype);
    for (std::int64_t i = 0; i < mask.numel(); ++i) store_element(mask.data_ptr(), i, dtype, i % 3 == 0 ? kept : 0);
    const std::string kind = dtype.code == kBool.code ? "bool" : "additive";
    EXPECT_EQ(error_text<ValueError>(
                  [&] { static_cast<void>(Inputs{}.forward(Enum::SAGE_ATTN_3, options({}), {.attn_mask = mask})); }),
              "SAGE_ATTN_3 does not support a mask of kind " + kind +
                  ". Supported kinds: padding, spans. FLASH_ATTN would do.");
  }
}

}  // namespace
}  // namespace ditattn
