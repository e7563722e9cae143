// Wrong arguments of forward, on every backend: the error's type, that its text has the value, and that nothing was
// written.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/conformance/run_case.hpp"

namespace ditattn::conformance {
namespace {

using testing::HasSubstr;

constexpr DLDevice kCuda{kDLCUDA, 0};
constexpr float kSentinel = 77;

Tensor zeros(std::initializer_list<std::int64_t> shape, DLDataType dtype = kFloat32) {
  Tensor tensor = empty(shape, dtype);
  for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, dtype, 0);
  return tensor;
}

// A good call, to be made wrong in one place: B=2 Sq=3 Skv=5 H=4 Hkv=2 D=8.
struct Call {
  ImplConfig config{.num_heads = 4, .head_size = 8, .num_kv_heads = 2};
  Tensor query = zeros({2, 3, 4, 8});
  Tensor key = zeros({2, 5, 2, 8});
  Tensor value = zeros({2, 5, 2, 8});
  Tensor mask;
  Tensor out = zeros({2, 3, 4, 8});
  Tensor lse = zeros({2, 4, 3});

  Tensor run(const AttentionBackend& backend) const {
    AttentionMetadata metadata(nullptr);
    if (mask.defined()) metadata = AttentionMetadata({.attn_mask = mask});
    return backend.make(config)->forward(query, key, value, metadata, {.out = out, .lse = lse});
  }
};

bool untouched(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().device_type != kDLCPU || tensor.dtype() != kFloat32) return true;
  const auto* data = static_cast<const float*>(tensor.data_ptr());
  return data == nullptr || *data == kSentinel;
}

// Runs `call` on every backend; its error must be a ValueError whose text has every one of `texts`.
void expect_refused(const Call& call, std::initializer_list<std::string> texts) {
  const std::vector<NamedBackend> backends = cpu_backends();
  ASSERT_FALSE(backends.empty());
  for (const NamedBackend& named : backends) {
    SCOPED_TRACE(named.member);
    for (const Tensor& tensor : {call.out, call.lse}) {
      const bool fillable = tensor.defined() && tensor.device().device_type == kDLCPU && tensor.dtype() == kFloat32;
      if (fillable && tensor.numel() > 0) *static_cast<float*>(tensor.data_ptr()) = kSentinel;
    }
    try {
      call.run(*named.backend);
      ADD_FAILURE() << "no error";
    } catch (const ValueError& error) {
      for (const std::string& text : texts) EXPECT_THAT(std::string(error.message()), HasSubstr(text));
    } catch (const std::exception& error) {
      ADD_FAILURE() << "not a ValueError: " << error.what();
    }
    EXPECT_TRUE(untouched(call.out)) << "out was written";
    EXPECT_TRUE(untouched(call.lse)) << "lse was written";
  }
}

// A view of `tensor`'s memory, which the caller keeps.
Tensor view_of(const Tensor& tensor, std::initializer_list<std::int64_t> shape,
               std::initializer_list<std::int64_t> strides, DLDevice device = kCpu) {
  return wrap(tensor.data_ptr(), shape, tensor.dtype(), strides, device);
}

TEST(BadInput, GoodCallIsTaken) {
  for (const NamedBackend& named : cpu_backends()) EXPECT_NO_THROW(Call{}.run(*named.backend)) << named.member;
}

TEST(BadInput, Rank) {
  Call call;
  call.query = zeros({2, 3, 32});
  expect_refused(call, {"query", "4 dimensions", "(2, 3, 32)"});
  call = {};
  call.value = zeros({1, 2, 5, 2, 8});
  expect_refused(call, {"value", "(1, 2, 5, 2, 8)"});
}

TEST(BadInput, MissingTensor) {
  Call call;
  call.key = Tensor();
  expect_refused(call, {"key is missing"});
}

TEST(BadInput, Dtype) {
  Call call;
  call.key = zeros({2, 5, 2, 8}, kFloat16);
  expect_refused(call, {"same dtype", "float32, float16 and float32"});
  for (const DLDataType dtype : {kFloat64, kInt32, kBool}) {
    call = {};
    call.query = zeros({2, 3, 4, 8}, dtype);
    call.key = zeros({2, 5, 2, 8}, dtype);
    call.value = zeros({2, 5, 2, 8}, dtype);
    call.out = Tensor();
    expect_refused(call, {"dtype=" + dtype_name(dtype), "Supported dtypes: float32"});
  }
}

TEST(BadInput, Device) {
  const Call good;  // owns the memory of views
  Call call;
  call.key = view_of(good.key, {2, 5, 2, 8}, {80, 16, 8, 1}, kCuda);
  expect_refused(call, {"same device", "cpu, cuda:0 and cpu"});
  call = {};
  call.out = view_of(good.out, {2, 3, 4, 8}, {96, 32, 8, 1}, kCuda);
  expect_refused(call, {"out is on cuda:0"});
}

TEST(BadInput, DeviceNobodyHas) {
  const DLDevice device{kDLROCM, 3};
  const Call good;
  Call call;
  call.query = view_of(good.query, {2, 3, 4, 8}, {96, 32, 8, 1}, device);
  call.key = view_of(good.key, {2, 5, 2, 8}, {80, 16, 8, 1}, device);
  call.value = view_of(good.value, {2, 5, 2, 8}, {80, 16, 8, 1}, device);
  call.out = view_of(good.out, {2, 3, 4, 8}, {96, 32, 8, 1}, device);
  call.lse = Tensor();
  expect_refused(call, {"device=rocm:3", "Supported devices: cpu"});
}

TEST(BadInput, Sizes) {
  Call call;
  call.query = zeros({2, 3, 3, 8});
  expect_refused(call, {"query has heads=3, expected 4", "(2, 3, 3, 8)"});
  call = {};
  call.key = zeros({2, 5, 4, 8});
  expect_refused(call, {"key has heads=4, expected 2"});
  call = {};
  call.key = zeros({1, 5, 2, 8});
  expect_refused(call, {"key has batch=1, expected 2"});
  call = {};
  call.key = zeros({2, 5, 2, 16});
  expect_refused(call, {"key has head_size=16, expected 8"});
  call = {};
  call.value = zeros({2, 6, 2, 8});
  expect_refused(call, {"(2, 5, 2, 8) and (2, 6, 2, 8)"});
}

TEST(BadInput, NegativeAndAbsurdSizes) {
  float element = 0;
  EXPECT_THROW(wrap(&element, {1, -1, 1, 1}, kFloat32), ValueError);
  EXPECT_THROW(empty({INT64_MAX, 8}, kFloat32), ValueError);
}

TEST(BadInput, Strides) {
  const Call good;  // owns the memory of views
  Tensor memory;    // outlives the views of it
  Call call;
  memory = zeros({2, 3, 4, 16});
  call.query = view_of(memory, {2, 3, 4, 8}, {192, 64, 16, 2});
  expect_refused(call, {"query", "unit last stride", "(192, 64, 16, 2)"});
  call = {};
  call.key = view_of(good.key, {2, 5, 2, 8}, {std::int64_t{1} << 61, 16, 8, 1});
  expect_refused(call, {"key", "2305843009213693952", "addressed"});
  call = {};
  call.value = view_of(good.value, {2, 5, 2, 8}, {80, INT64_MIN, 8, 1});
  expect_refused(call, {"value", "-9223372036854775808"});
}

TEST(BadInput, NullData) {
  Call call;
  call.value = wrap(nullptr, {2, 5, 2, 8}, kFloat32);
  expect_refused(call, {"value", "(2, 5, 2, 8)", "null data pointer"});
}

TEST(BadInput, OutputShapeAndDtype) {
  Tensor memory;  // outlives the views of it
  Call call;
  call.out = zeros({2, 4, 3, 8});
  expect_refused(call, {"out must have shape (2, 3, 4, 8), got (2, 4, 3, 8)"});
  call = {};
  call.out = zeros({2, 3, 4, 8}, kBFloat16);
  expect_refused(call, {"out has dtype bfloat16, expected float32"});
  call = {};
  memory = zeros({2, 3, 4, 16});
  call.out = view_of(memory, {2, 3, 4, 8}, {192, 64, 16, 2});
  expect_refused(call, {"out", "unit last stride", "(192, 64, 16, 2)"});
  call = {};
  call.lse = zeros({2, 3, 4});
  expect_refused(call, {"lse must have shape (2, 4, 3), got (2, 3, 4)"});
  call = {};
  call.lse = zeros({2, 4, 3}, kFloat64);
  expect_refused(call, {"lse has dtype float64, expected float32"});
}

TEST(BadInput, OutputOverlapsItself) {
  const Call good;  // owns the memory of views
  Call call;
  call.out = view_of(good.out, {2, 3, 4, 8}, {0, 32, 8, 1});
  expect_refused(call, {"out", "(0, 32, 8, 1)", "overlap"});
  call = {};
  call.out = view_of(good.out, {2, 3, 4, 8}, {96, 32, 4, 1});
  expect_refused(call, {"(96, 32, 4, 1)", "overlap"});
  call = {};
  call.lse = view_of(good.lse, {2, 4, 3}, {12, 0, 1});
  expect_refused(call, {"lse", "(12, 0, 1)", "overlap"});
}

TEST(BadInput, OutputSharesMemory) {
  Call call;
  call.out = call.query;
  expect_refused(call, {"out shares memory with query"});
  call = {};
  const Tensor both = zeros({400});
  call.key = wrap(both.data_ptr(), {2, 5, 2, 8}, kFloat32);
  call.out = wrap(static_cast<float*>(both.data_ptr()) + 159, {2, 3, 4, 8}, kFloat32);  // the last element of key
  expect_refused(call, {"out shares memory with key"});
  call.out = wrap(static_cast<float*>(both.data_ptr()) + 160, {2, 3, 4, 8}, kFloat32);
  for (const NamedBackend& named : cpu_backends()) EXPECT_NO_THROW(call.run(*named.backend)) << named.member;
  call = {};
  call.mask = zeros({2, 4, 3, 5});
  call.lse = wrap(call.mask.data_ptr(), {2, 4, 3}, kFloat32);
  expect_refused(call, {"lse shares memory with attn_mask"});
  call = {};
  call.lse = wrap(call.out.data_ptr(), {2, 4, 3}, kFloat32);
  expect_refused(call, {"out shares memory with lse"});
}

TEST(BadInput, Mask) {
  Tensor memory;  // outlives the views of it
  Call call;
  call.mask = zeros({2, 5}, kInt32);
  expect_refused(call, {"attn_mask has dtype int32", "bool"});
  call = {};
  call.mask = zeros({2, 6}, kBool);
  expect_refused(call, {"attn_mask of shape (2, 6)", "(2, 4, 3, 5)"});
  call = {};
  call.mask = zeros({3, 5}, kBool);  // (Sq, Skv), as PyTorch would take it
  expect_refused(call, {"(3, 5)", "(1, 1, queries, keys)"});
  call = {};
  call.mask = zeros({2, 3, 3, 5});
  expect_refused(call, {"attn_mask of shape (2, 3, 3, 5)", "(2, 4, 3, 5)"});
  call = {};
  call.mask = zeros({1, 1, 1, 1, 5}, kBool);
  expect_refused(call, {"1 to 4 dimensions", "(1, 1, 1, 1, 5)"});
  call = {};
  call.mask = zeros({}, kBool);
  expect_refused(call, {"1 to 4 dimensions", "()"});
  call = {};
  memory = zeros({2, 5});
  call.mask = view_of(memory, {2, 5}, {5, 1}, kCuda);
  expect_refused(call, {"attn_mask is on cuda:0, query on cpu"});
  call = {};
  memory = zeros({2, 5});
  call.mask = view_of(memory, {2, 5}, {INT64_MAX, 1});
  expect_refused(call, {"attn_mask", "9223372036854775807"});
}

TEST(BadInput, Config) {
  Call call;
  call.config.num_kv_heads = 3;
  expect_refused(call, {"q_heads=4", "kv_heads=3"});
  call = {};
  call.config.head_size = 0;
  expect_refused(call, {"head_size=0"});
  call = {};
  call.config.num_heads = -4;
  expect_refused(call, {"num_heads=-4"});
  for (const double scale : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    call = {};
    call.config.softmax_scale = scale;
    expect_refused(call, {"softmax_scale=", "finite"});
  }
}

}  // namespace
}  // namespace ditattn::conformance
