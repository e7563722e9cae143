// FLASH_ATTN never holds a matrix of logits: peak memory is inputs, output and at most 64 MB.

#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iostream>
#include <string>

namespace ditattn {
namespace {

// A field of /proc/self/status in bytes.
std::int64_t memory(const std::string& field) {
  std::ifstream stream("/proc/self/status");
  for (std::string line; std::getline(stream, line);) {
    if (line.starts_with(field + ":")) return std::stoll(line.substr(field.size() + 1)) * 1024;
  }
  return -1;
}

TEST(Memory, FlashAttentionAt16kTokensStaysUnder64MB) {
  const auto impl = DiffusionAttentionBackendEnum::FLASH_ATTN.get_class()->make({.num_heads = 4, .head_size = 64});
  const auto make = [] {
    Tensor tensor = empty({1, 16384, 4, 64}, kFloat32);
    auto* data = static_cast<float*>(tensor.data_ptr());
    for (std::int64_t i = 0; i < tensor.numel(); ++i) data[i] = static_cast<float>(i % 17) * 0.1F;
    return tensor;
  };
  const Tensor query = make();
  const Tensor key = make();
  const Tensor value = make();
  const Tensor out = make();
  const std::int64_t before = memory("VmRSS");
  ASSERT_GT(before, 4 * 16 << 20);  // the tensors are there
  impl->forward(query, key, value, {}, {.out = out});
  const std::int64_t more = memory("VmHWM") - before;
  std::cout << fmt::format("peak memory beside inputs and output: {:.1f} MB\n", static_cast<double>(more) * 1e-6);
  EXPECT_LT(more, 64 << 20);
}

}  // namespace
}  // namespace ditattn
