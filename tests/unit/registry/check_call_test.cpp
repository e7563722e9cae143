// Everything `forward` checks before it reads or writes: one test per message.

#include <gtest/gtest.h>

#include <array>
#include <optional>

#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using testing::expect_contains;

constexpr DLDevice kCuda{kDLCUDA, 0};

// A good call of 4 heads over 2 K/V heads; each test spoils one part of it.
struct Call {
  Tensor query = empty({2, 5, 4, 8}, kFloat32);
  Tensor key = empty({2, 7, 2, 8}, kFloat32);
  Tensor value = empty({2, 7, 2, 8}, kFloat32);
  AttentionMetadata metadata = {};
  ForwardOutputs outputs = {};

  Call() {
    for (const Tensor& tensor : {query, key, value}) zero(tensor);
  }
  static void zero(const Tensor& tensor) {
    for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(data_pointer(tensor), i, tensor.dtype(), 0);
  }
  void mask(const Tensor& mask) { metadata = AttentionMetadata({.attn_mask = mask}); }
  [[nodiscard]] Tensor forward() const {
    const auto backend = std::make_shared<testing::ToyBackend>();
    return backend->make({.num_heads = 4, .head_size = 8, .num_kv_heads = 2})
        ->forward(query, key, value, metadata, outputs);
  }
  [[nodiscard]] std::string error() const {
    return testing::error_text<ValueError>([&] { return forward(); });
  }
};

Tensor bool_mask(std::initializer_list<std::int64_t> shape) {
  Tensor mask = empty(shape, kBool);
  for (std::int64_t i = 0; i < mask.numel(); ++i) store_element(data_pointer(mask), i, kBool, i % 2 == 1);
  return mask;
}

TEST(CheckCall, GoodCallPasses) { EXPECT_EQ(shape_name(Call().forward()), "(2, 5, 4, 8)"); }

TEST(CheckCall, MissingTensors) {
  Call call;
  call.query = Tensor();
  EXPECT_EQ(call.error(), "query is missing.");
  call = Call();
  call.key = Tensor();
  EXPECT_EQ(call.error(), "key is missing.");
  call = Call();
  call.value = Tensor();
  EXPECT_EQ(call.error(), "value is missing.");
}

TEST(CheckCall, Rank) {
  Call call;
  call.query = empty({2, 5, 32}, kFloat32);
  EXPECT_EQ(call.error(), "query must have 4 dimensions (batch, tokens, heads, head_size), got shape (2, 5, 32).");
  call = Call();
  call.value = empty({1, 2, 7, 2, 8}, kFloat32);
  EXPECT_EQ(call.error(), "value must have 4 dimensions (batch, tokens, heads, head_size), got shape (1, 2, 7, 2, 8).");
}

TEST(CheckCall, ElementTypesThatAreNotPlain) {
  Call call;
  call.query = wrap(data_pointer(call.query), {2, 5, 4, 8}, DLDataType{kDLFloat, 32, 2});
  EXPECT_EQ(call.error(), "query has dtype dtype(code=2, bits=32, lanes=2), which is not a plain element type.");
  call.query = wrap(data_pointer(call.key), {2, 5, 4, 8}, DLDataType{kDLUInt, 4, 1});
  expect_contains(call.error(), {"query has dtype", "not a plain element type"});
}

TEST(CheckCall, DtypesMustAgree) {
  Call call;
  call.key = empty({2, 7, 2, 8}, kBFloat16);
  EXPECT_EQ(call.error(), "Query, key, and value must have the same dtype, got float32, bfloat16 and float32.");
}

TEST(CheckCall, DevicesMustAgree) {
  Call call;
  call.value = wrap(data_pointer(call.value), {2, 7, 2, 8}, kFloat32, {}, kCuda);
  EXPECT_EQ(call.error(), "Query, key, and value must be on the same device, got cpu, cpu and cuda:0.");
}

TEST(CheckCall, SizesMustBeTheImplementations) {
  Call call;
  call.query = empty({2, 5, 3, 8}, kFloat32);
  EXPECT_EQ(call.error(), "query has heads=3, expected 4 (shape (2, 5, 3, 8)).");
  call.query = empty({2, 5, 4, 16}, kFloat32);
  EXPECT_EQ(call.error(), "query has head_size=16, expected 8 (shape (2, 5, 4, 16)).");
  call = Call();
  call.key = empty({3, 7, 2, 8}, kFloat32);
  EXPECT_EQ(call.error(), "key has batch=3, expected 2 (shape (3, 7, 2, 8)).");
  call.key = empty({2, 7, 4, 8}, kFloat32);
  EXPECT_EQ(call.error(), "key has heads=4, expected 2 (shape (2, 7, 4, 8)).");
  call.key = empty({2, 7, 2, 9}, kFloat32);
  EXPECT_EQ(call.error(), "key has head_size=9, expected 8 (shape (2, 7, 2, 9)).");
}

TEST(CheckCall, KeyAndValueMustAgree) {
  Call call;
  call.value = empty({2, 6, 2, 8}, kFloat32);
  EXPECT_EQ(call.error(), "Key and value must have the same shape, got (2, 7, 2, 8) and (2, 6, 2, 8).");
}

TEST(CheckCall, LastStrideMustBeOne) {
  Call call;
  std::array<float, 2 * 5 * 4 * 16> wide = {};
  call.query = wrap(wide.data(), {2, 5, 4, 8}, kFloat32, {320, 64, 16, 2});
  EXPECT_EQ(call.error(),
            "query must have a unit last stride, got strides (320, 64, 16, 2) for shape (2, 5, 4, 8). Make it "
            "contiguous first.");
}

TEST(CheckCall, LastStrideOfOneElementIsFree) {
  std::array<float, 8> data = {};
  const Tensor one = wrap(data.data(), {1, 1, 1, 1}, kFloat32, {8, 8, 8, 5});
  const auto backend = std::make_shared<testing::ToyBackend>();
  EXPECT_EQ(backend->make({.num_heads = 1, .head_size = 1})->forward(one, one, one).numel(), 1);
}

TEST(CheckCall, StridesThatReachPastTheAddressSpace) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 61;
  for (std::int64_t stride : {kHuge, -kHuge, INT64_MAX, INT64_MIN}) {
    Call call;
    call.query = wrap(data_pointer(call.query), {2, 5, 4, 8}, kFloat32, {stride, 32, 8, 1});
    expect_contains(call.error(), {"query of shape (2, 5, 4, 8) and strides (" + std::to_string(stride),
                                   "reaches past what can be addressed."});
  }
}

TEST(CheckCall, NullData) {
  Call call;
  call.key = wrap(nullptr, {2, 7, 2, 8}, kFloat32);
  EXPECT_EQ(call.error(), "key of shape (2, 7, 2, 8) has a null data pointer.");
}

TEST(CheckCall, ZeroStridesOnInputsAreAllowed) {
  Call call;
  std::array<float, 8> row = {1, 2, 3, 4, 5, 6, 7, 8};
  call.value = wrap(row.data(), {2, 7, 2, 8}, kFloat32, {0, 0, 0, 1});
  call.key = call.value;
  EXPECT_EQ(load_element(data_pointer(call.forward()), 5, kFloat32), 6);
}

TEST(CheckMask, Dtype) {
  Call call;
  call.mask(empty({2, 7}, kFloat64));
  EXPECT_EQ(call.error(),
            "attn_mask has dtype float64. Valid dtypes are: bool (true = attend), and float32, float16, bfloat16 "
            "(added to the logits).");
  call.mask(empty({2, 7}, kInt64));
  expect_contains(call.error(), {"attn_mask has dtype int64."});
}

TEST(CheckMask, Device) {
  Call call;
  std::array<bool, 14> data = {};
  call.mask(wrap(data.data(), {2, 7}, kBool, {}, kCuda));
  EXPECT_EQ(call.error(), "attn_mask is on cuda:0, query on cpu.");
}

TEST(CheckMask, Rank) {
  Call call;
  call.mask(empty({}, kBool));
  EXPECT_EQ(call.error(), "attn_mask must have 1 to 4 dimensions, got shape ().");
  call.mask(empty({1, 1, 1, 1, 7}, kBool));
  EXPECT_EQ(call.error(), "attn_mask must have 1 to 4 dimensions, got shape (1, 1, 1, 1, 7).");
}

TEST(CheckMask, ShapesThatBroadcast) {
  for (const auto& shape : std::initializer_list<std::initializer_list<std::int64_t>>{{7},
                                                                                      {1},
                                                                                      {2, 7},
                                                                                      {1, 7},
                                                                                      {4, 5, 7},
                                                                                      {1, 5, 7},
                                                                                      {4, 1, 7},
                                                                                      {4, 5, 1},
                                                                                      {2, 4, 5, 7},
                                                                                      {2, 1, 1, 7},
                                                                                      {1, 4, 1, 7},
                                                                                      {1, 1, 5, 1},
                                                                                      {2, 1, 1, 1}}) {
    Call call;
    call.mask(bool_mask(shape));
    EXPECT_NO_THROW(call.forward()) << shape_name(std::span(shape.begin(), shape.size()));
  }
}

TEST(CheckMask, ShapesThatDoNot) {
  for (const auto& shape : std::initializer_list<std::initializer_list<std::int64_t>>{
           {6}, {2, 5, 7}, {4, 7, 5}, {3, 4, 5, 7}, {2, 3, 5, 7}, {2, 4, 6, 7}, {2, 4, 5, 6}, {0}}) {
    Call call;
    call.mask(bool_mask(shape));
    EXPECT_EQ(call.error(), "attn_mask of shape " + shape_name(std::span(shape.begin(), shape.size())) +
                                " does not broadcast to (batch, heads, queries, keys) = (2, 4, 5, 7).");
  }
}

TEST(CheckMask, TwoDimensionsAreBatchAndKeys) {
  for (const auto& shape : std::initializer_list<std::initializer_list<std::int64_t>>{{5, 7}, {2, 1}, {3, 7}}) {
    Call call;
    call.mask(bool_mask(shape));
    EXPECT_EQ(call.error(),
              "attn_mask of shape " + shape_name(std::span(shape.begin(), shape.size())) +
                  " does not broadcast to (batch, heads, queries, keys) = (2, 4, 5, 7). Two dimensions are (batch, "
                  "keys); give a (queries, keys) mask as (1, 1, queries, keys).");
  }
}

TEST(CheckMask, StridesThatReachPastTheAddressSpace) {
  Call call;
  call.mask(wrap(data_pointer(call.query), {2, 7}, kFloat32, {std::int64_t{1} << 62, 1}));
  expect_contains(call.error(), {"attn_mask of shape (2, 7)", "reaches past what can be addressed."});
}

// What each mask is called when a backend refuses it.
std::optional<std::string> refused_kind(const Tensor& mask) {
  Capabilities can = testing::toy_capabilities();
  can.masks = {"spans"};
  const auto backend = std::make_shared<testing::ToyBackend>("TOY", 1, can);
  const auto attention = backend->make({.num_heads = 4, .head_size = 8, .num_kv_heads = 2});
  const Call call;
  try {
    attention->forward(call.query, call.key, call.value, AttentionMetadata({.attn_mask = mask}));
    return std::nullopt;
  } catch (const ValueError& error) {
    const std::string text = error.message();
    const std::string lead = "mask of kind ";
    const std::size_t at = text.find(lead);
    return at == std::string::npos ? text : text.substr(at + lead.size(), text.find('.', at) - at - lead.size());
  }
}

TEST(MaskKindOfACall, IsWhatTheMaskReallyNeeds) {
  Tensor all = empty({2, 4, 5, 7}, kBool);
  for (std::int64_t i = 0; i < all.numel(); ++i) store_element(data_pointer(all), i, kBool, 1);
  EXPECT_EQ(refused_kind(all), std::nullopt) << "hides nothing";
  EXPECT_EQ(refused_kind(bool_mask({2, 7})), "padding");
  EXPECT_EQ(refused_kind(bool_mask({2, 1, 1, 7})), "padding");
  EXPECT_EQ(refused_kind(bool_mask({7})), "padding");
  EXPECT_EQ(refused_kind(bool_mask({1, 1, 5, 7})), "bool");
  EXPECT_EQ(refused_kind(bool_mask({4, 1, 7})), "bool");
  EXPECT_EQ(refused_kind(testing::counting({1, 1, 1, 7})), "additive");
  EXPECT_EQ(refused_kind(testing::counting({2, 7}, kFloat16)), "additive");
}

TEST(CheckOutputs, ShapeDtypeAndDevice) {
  Call call;
  call.outputs.out = empty({2, 5, 4, 9}, kFloat32);
  EXPECT_EQ(call.error(), "out must have shape (2, 5, 4, 8), got (2, 5, 4, 9).");
  call.outputs.out = empty({2, 5, 32}, kFloat32);
  EXPECT_EQ(call.error(), "out must have shape (2, 5, 4, 8), got (2, 5, 32).");
  call.outputs.out = empty({2, 5, 4, 8}, kFloat16);
  EXPECT_EQ(call.error(), "out has dtype float16, expected float32.");
  call.outputs.out = wrap(data_pointer(empty({2, 5, 4, 8}, kFloat32)), {2, 5, 4, 8}, kFloat32, {}, kCuda);
  EXPECT_EQ(call.error(), "out is on cuda:0, query on cpu.");
}

TEST(CheckOutputs, LogSumExp) {
  Call call;
  call.outputs.lse = empty({2, 5, 4}, kFloat32);
  EXPECT_EQ(call.error(), "lse must have shape (2, 4, 5), got (2, 5, 4).");
  call.outputs.lse = empty({2, 4, 5}, kFloat64);
  EXPECT_EQ(call.error(), "lse has dtype float64, expected float32.");
}

TEST(CheckOutputs, StridesOfOut) {
  Call call;
  std::array<float, 2 * 5 * 4 * 16> wide = {};
  call.outputs.out = wrap(wide.data(), {2, 5, 4, 8}, kFloat32, {320, 64, 16, 2});
  expect_contains(call.error(), {"out must have a unit last stride, got strides (320, 64, 16, 2)"});
  call.outputs.out = wrap(wide.data(), {2, 5, 4, 8}, kFloat32, {0, 32, 8, 1});
  EXPECT_EQ(call.error(), "out of shape (2, 5, 4, 8) has strides (0, 32, 8, 1): its elements overlap.");
  call.outputs.out = wrap(wide.data(), {2, 5, 4, 8}, kFloat32, {320, 64, 16, 1});
  EXPECT_NO_THROW(call.forward()) << "gaps are fine";
}

TEST(CheckOutputs, OverlapWithAnInput) {
  Call call;
  call.outputs.out = call.query;
  EXPECT_EQ(call.error(), "out shares memory with query.");
  call.outputs.out = Tensor();
  call.outputs.lse = wrap(data_pointer(call.key), {2, 4, 5}, kFloat32);
  EXPECT_EQ(call.error(), "lse shares memory with key.");
  call.outputs.lse = wrap(data_pointer(call.value), {2, 4, 5}, kFloat32);
  EXPECT_EQ(call.error(), "lse shares memory with value.");
}

TEST(CheckOutputs, OverlapWithTheMask) {
  Call call;
  const Tensor out = empty({2, 5, 4, 8}, kFloat32);
  Call::zero(out);
  call.mask(wrap(data_pointer(out), {2, 7}, kFloat32));
  call.outputs.out = out;
  EXPECT_EQ(call.error(), "out shares memory with attn_mask.");
}

TEST(CheckOutputs, OverlapOfOutAndLse) {
  Call call;
  call.outputs.out = empty({2, 5, 4, 8}, kFloat32);
  call.outputs.lse = wrap(data_pointer(call.outputs.out), {2, 4, 5}, kFloat32);
  EXPECT_EQ(call.error(), "out shares memory with lse.");
}

// out beside query, key and value in one packed buffer: no byte is shared, so it is allowed.
TEST(CheckOutputs, InterleavedWithTheInputsIsAllowed) {
  std::array<float, 2 * 7 * 4 * 16> packed = {};
  const auto part = [&](std::int64_t which) {
    return wrap(packed.data() + which * 16, {2, 7, 2, 8}, kFloat32, {448, 64, 8, 1});
  };
  const auto backend = std::make_shared<testing::ToyBackend>();
  const auto attention = backend->make({.num_heads = 2, .head_size = 8});
  EXPECT_NO_THROW(attention->forward(part(0), part(1), part(2), {}, {.out = part(3)}));
  testing::error_text<ValueError>([&] { return attention->forward(part(0), part(1), part(2), {}, {.out = part(1)}); });
}

TEST(CheckOutputs, NothingIsAllocatedOnDevicesThatAreNotThere) {
  Capabilities can = testing::toy_capabilities();
  can.devices = {"cpu", "cuda"};
  const auto backend = std::make_shared<testing::ToyBackend>("TOY", 1, can);
  float element = 0;
  const Tensor remote = wrap(&element, {1, 1, 1, 1}, kFloat32, {}, {kDLCUDA, 99});
  const std::string text = testing::error_text<ValueError>(
      [&] { return backend->make({.num_heads = 1, .head_size = 1})->forward(remote, remote, remote); });
  EXPECT_NE(text.find("There is no device cuda:99: "), std::string::npos) << text;
}

}  // namespace
}  // namespace ditattn
