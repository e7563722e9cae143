// Calls that are not looked at again because one like them was: what differs must be.

#include <array>
#include <memory>
#include <string>

#include "ditattn/registry.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using testing::counting;
using testing::error_text;
using testing::expect_contains;
using testing::toy_capabilities;
using testing::ToyBackend;
using testing::unused;

// Counts how often it is asked whether it takes a problem.
class AskedBackend final : public ToyBackend {
 public:
  explicit AskedBackend(Capabilities can = toy_capabilities()) : ToyBackend("ASKED", 1, std::move(can)) {}
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    ++asked;
    return ToyBackend::explain(problem);
  }
  mutable int asked = 0;
};

struct Tensors {
  Tensor query = counting({2, 4, 2, 8});
  Tensor key = counting({2, 6, 2, 8});
  Tensor value = counting({2, 6, 2, 8});
  Tensor out = empty({2, 4, 2, 8}, kFloat32);
};

class RepeatedCallsTest : public ::testing::Test {
 protected:
  RepeatedCallsTest() { forward(); }

  void forward() const { forward(tensors.query, tensors.key, tensors.value, tensors.out); }
  void forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out) const {
    layer->forward(query, key, value, {}, {.out = out, .lse = {}});
  }

  Tensors tensors;
  std::shared_ptr<AskedBackend> backend = std::make_shared<AskedBackend>();
  std::unique_ptr<AttentionImpl> layer = backend->make({.num_heads = 2, .head_size = 8});
};

TEST_F(RepeatedCallsTest, OthersOfTheSameKindAreNotAskedAbout) {
  const Tensors others;
  forward(others.query, others.key, others.value, others.out);
  const auto second = backend->make({.num_heads = 2, .head_size = 8, .softmax_scale = 2});
  second->forward(others.query, others.key, others.value, {}, {.out = others.out, .lse = {}});
  EXPECT_EQ(backend->asked, 1);
  EXPECT_EQ(load_element(others.out.data_ptr(), 0, kFloat32), load_element(tensors.out.data_ptr(), 0, kFloat32));
}

TEST_F(RepeatedCallsTest, WhatIsWrongIsFound) {
  const auto refusal = [&](const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out) {
    return error_text<ValueError>([&] { forward(query, key, value, out); });
  };
  const Tensors& t = tensors;
  const std::array<std::int64_t, 4> rows{2, 4, 2, 8};
  expect_contains(refusal(Tensor(), t.key, t.value, t.out), {"query is missing"});
  expect_contains(refusal(t.query, t.key, t.value, t.query), {"out shares memory with query"});
  expect_contains(refusal(wrap(nullptr, rows, kFloat32), t.key, t.value, t.out), {"null data pointer"});
  expect_contains(refusal(t.query, t.key, t.value, wrap(nullptr, rows, kFloat32)), {"null data pointer"});
  expect_contains(refusal(counting({2, 4, 2, 8}, kFloat16), t.key, t.value, t.out), {"must have the same dtype"});
  expect_contains(refusal(t.query, t.key, t.value, empty({2, 4, 2, 8}, kFloat16)), {"out has dtype float16"});
  expect_contains(refusal(t.query, t.key, counting({2, 5, 2, 8}), t.out), {"must have the same shape"});
  expect_contains(refusal(t.query, t.key, t.value, empty({2, 4, 2, 7}, kFloat32)), {"out must have shape"});
  expect_contains(refusal(counting({2, 4, 16}), t.key, t.value, t.out), {"must have 4 dimensions"});
  const Tensor overlapping = wrap(t.out.data_ptr(), rows, kFloat32, std::array<std::int64_t, 4>{64, 8, 8, 1});
  expect_contains(refusal(t.query, t.key, t.value, overlapping), {"its elements overlap"});
  const Tensor turned = wrap(t.query.data_ptr(), rows, kFloat32, std::array<std::int64_t, 4>{64, 16, 1, 2});
  expect_contains(refusal(turned, t.key, t.value, t.out), {"unit last stride"});
}

TEST_F(RepeatedCallsTest, OtherLayersAndClassesAreAskedThemselves) {
  const auto wide = backend->make({.num_heads = 4, .head_size = 8});
  EXPECT_THROW(wide->forward(tensors.query, tensors.key, tensors.value, {}, {.out = tensors.out, .lse = {}}),
               ValueError);
  Capabilities can = toy_capabilities();
  can.dtypes = {kFloat16};
  for (int i = 0; i < 20; ++i) {  // where they are made and destroyed, addresses come again
    const auto other = std::make_shared<AskedBackend>(can);
    const auto refusing = other->make({.num_heads = 2, .head_size = 8});
    EXPECT_THROW(refusing->forward(tensors.query, tensors.key, tensors.value, {}, {.out = tensors.out, .lse = {}}),
                 ValueError);
    EXPECT_EQ(other->asked, 1);
  }
}

TEST_F(RepeatedCallsTest, AnotherAlignmentIsAnotherProblem) {
  Capabilities can = toy_capabilities();
  can.alignment = 16;
  const auto aligned = std::make_shared<AskedBackend>(can)->make({.num_heads = 2, .head_size = 8});
  const auto call = [&](const Tensor& query) {
    aligned->forward(query, tensors.key, tensors.value, {}, {.out = tensors.out, .lse = {}});
  };
  call(tensors.query);
  Tensor memory = empty({2 * 4 * 2 * 8 + 4}, kFloat32);
  auto* const data = static_cast<float*>(memory.data_ptr());
  for (const int shift : {1, 2, 3}) {
    const Tensor shifted = wrap(data + shift, {2, 4, 2, 8}, kFloat32);
    expect_contains(error_text<ValueError>([&] { call(shifted); }), {"multiples of 16 bytes"});
  }
  call(wrap(data + 4, {2, 4, 2, 8}, kFloat32));
}

TEST_F(RepeatedCallsTest, RegistrationsAreReasonsToAskAgain) {
  const std::string name = unused("REPEATED_");
  register_diffusion_backend(DiffusionAttentionBackendEnum::define(name), "repeated.module.Backend");
  forward();
  EXPECT_EQ(backend->asked, 2);
}

TEST_F(RepeatedCallsTest, WithoutAnOutputOneIsMade) {
  const Tensor first = layer->forward(tensors.query, tensors.key, tensors.value);
  const Tensor second = layer->forward(tensors.query, tensors.key, tensors.value);
  EXPECT_EQ(backend->asked, 2);  // with an output, and without
  EXPECT_NE(first.data_ptr(), second.data_ptr());
}

}  // namespace
}  // namespace ditattn
