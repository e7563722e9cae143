// Ceilings of a machine: each is a rate or a reason, with and without a GPU.

#include "tools/ditattn/ceilings.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <stdexcept>

#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"

namespace ditattn::cli {
namespace {

void expect_rate_or_reason(const Json& entry, const char* unit) {
  EXPECT_NE(entry[unit].is_null(), entry["reason"].is_null()) << entry;
  EXPECT_NE(entry["how"].is_null(), entry["reason"].is_null()) << entry;
  EXPECT_TRUE(entry[unit].is_null() || entry[unit].get<double>() > 0) << entry;
}

TEST(Ceilings, OfAGpuAreMeasuredOrHaveAReason) {
  const Json ceilings = to_json(measure_ceilings({kDLCUDA, 0}, {kFloat16, kBFloat16, kFloat32}));
  fmt::print("{}\n", ceilings.dump(2));
  EXPECT_EQ(ceilings["device"], "cuda:0");
  ASSERT_EQ(ceilings["products"].size(), 3);
  for (const Json& entry : ceilings["products"]) expect_rate_or_reason(entry, "tflops");
  expect_rate_or_reason(ceilings["memory"], "gb_per_s");
  EXPECT_EQ(ceilings["memory"]["gb_per_s"].is_null(), cuda_info().devices.empty());
}

TEST(Ceilings, WhatThrowsHasAReason) {
  const Ceiling own = measured("x", []() -> Ceiling { throw MemoryError("there is no room"); });
  EXPECT_EQ(own.how, "there is no room");
  EXPECT_FALSE(own.rate);
  EXPECT_EQ(measured("x", []() -> Ceiling { throw std::runtime_error("it broke"); }).how, "it broke");
}

TEST(Ceilings, CountWhatAttentionDoes) {
  Problem problem{
      .batch = 2, .num_heads = 6, .num_kv_heads = 3, .seq_q = 10, .seq_kv = 20, .head_size = 8, .dtype = kBFloat16};
  EXPECT_EQ(operations(problem), 4.0 * 2 * 6 * 10 * 20 * 8);
  EXPECT_EQ(bytes_moved(problem), 2.0 * (2 * 10 * 6 * 8 * 2 + 2 * 20 * 3 * 8 * 2));  // query, out; key, value
  Ceilings ceilings;
  EXPECT_FALSE(memory_ms(ceilings, problem));
  ceilings.memory.rate = 1;  // GB/s
  EXPECT_DOUBLE_EQ(*memory_ms(ceilings, problem), bytes_moved(problem) * 1e-6);
  problem.causal = true;
  EXPECT_EQ(operations(problem), 2.0 * 2 * 6 * 10 * 20 * 8);
}

}  // namespace
}  // namespace ditattn::cli
