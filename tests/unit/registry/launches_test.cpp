// Counters of what really computed.

#include "ditattn/launches.hpp"

#include <gtest/gtest.h>

#include <map>
#include <thread>
#include <vector>

#include "ditattn/attention.hpp"
#include "ditattn/selector.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::ToyBackend;

// (role, back end) → calls
std::map<std::pair<std::string, std::string>, std::uint64_t> counts() {
  std::map<std::pair<std::string, std::string>, std::uint64_t> result;
  for (const LaunchCount& count : launch_counts()) result[{count.role, count.backend}] = count.calls;
  return result;
}

Tensor zeros(std::initializer_list<std::int64_t> shape) {
  Tensor tensor = empty(shape, kFloat32);
  std::fill_n(static_cast<float*>(tensor.data_ptr()), tensor.numel(), 0.0F);
  return tensor;
}

class Launches : public testing::RegistryTest {
 protected:
  void SetUp() override { reset_launch_counts(); }
  const testing::ScopedEnvironment unset_{"DIFFUSION_ATTENTION_BACKEND", nullptr};
  Tensor tensor_ = zeros({1, 3, 2, 8});
};

TEST_F(Launches, AreCountedByRoleAndBackend) {
  const BackendClass toy = std::make_shared<ToyBackend>("TOY_A");
  for (const char* role : {"self", "self", "cross", ""}) {
    toy->make({.num_heads = 2, .head_size = 8, .role = role})->forward(tensor_, tensor_, tensor_);
  }
  std::make_shared<ToyBackend>("TOY_B")->make({.num_heads = 2, .head_size = 8})->forward(tensor_, tensor_, tensor_);
  EXPECT_EQ(counts()[std::pair("self", "TOY_A")], 2U);
  EXPECT_EQ(counts()[std::pair("cross", "TOY_A")], 1U);
  EXPECT_EQ(counts()[std::pair("", "TOY_A")], 1U);
  EXPECT_EQ(counts()[std::pair("", "TOY_B")], 1U);
  reset_launch_counts();
  EXPECT_TRUE(launch_counts().empty());
}

TEST_F(Launches, WhatIsRefusedOrHasNoRowsIsNone) {
  const auto layer = std::make_shared<ToyBackend>("TOY_A")->make({.num_heads = 2, .head_size = 8});
  EXPECT_THROW(layer->forward(zeros({1, 3, 2, 9}), tensor_, tensor_), ValueError);
  layer->forward(zeros({1, 0, 2, 8}), tensor_, tensor_);
  EXPECT_TRUE(launch_counts().empty());
}

TEST_F(Launches, BehindAPlatformsDefaultTheOneThatRanIsCounted) {
  Capabilities small = testing::toy_capabilities();
  small.head_sizes.max = 8;
  use(Enum::FLASH_ATTN, std::make_shared<ToyBackend>("SMALL", 1, small));
  use(Enum::TORCH_SDPA, std::make_shared<ToyBackend>("ANY"));
  const auto layer = get_attn_backend_for_role("self").backend->make({.num_heads = 2, .head_size = 8, .role = "self"});
  layer->forward(tensor_, tensor_, tensor_);
  const Tensor wide = zeros({1, 3, 2, 16});
  attention(wide, wide, wide, {.role = "cross"});
  EXPECT_EQ(counts(), (std::map<std::pair<std::string, std::string>, std::uint64_t>{{{"self", "SMALL"}, 1},
                                                                                    {{"cross", "ANY"}, 1}}));
}

TEST_F(Launches, ThreadsLoseNone) {
  const auto layer = std::make_shared<ToyBackend>("TOY_A")->make({.num_heads = 2, .head_size = 8, .role = "many"});
  std::vector<std::thread> threads(4);
  for (std::thread& thread : threads) {
    thread = std::thread([&] {
      for (int call = 0; call < 250; ++call) layer->forward(tensor_, tensor_, tensor_);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(counts()[std::pair("many", "TOY_A")], 1000U);
}

}  // namespace
}  // namespace ditattn
