// What FLASHINFER_ATTN refuses, each with the value. Asking needs no GPU; in builds without it, skipped.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <functional>

#include "ditattn/ditattn.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

class ContractFlashInfer : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      backend = DiffusionAttentionBackendEnum::FLASHINFER_ATTN.get_class();
    } catch (const ImportError& error) {
      GTEST_SKIP() << "skipped: " << error.message();
    }
  }
  [[nodiscard]] std::string reasons(const std::function<void(Problem&)>& change) const {
    Problem problem{.num_heads = 4,
                    .num_kv_heads = 2,
                    .seq_q = 100,
                    .seq_kv = 200,
                    .head_size = 128,
                    .dtype = kBFloat16,
                    .device = {kDLCUDA, 0}};
    change(problem);
    return backend->explain(problem).text();
  }
  BackendClass backend;
};

TEST_F(ContractFlashInfer, CausalWithFewerKeysIsRefused) {
  EXPECT_EQ(reasons([](Problem& p) { p.causal = true; }), "");
  EXPECT_EQ(
      reasons([](Problem& p) {
        p.causal = true;
        p.seq_kv = 99;
      }),
      "FLASHINFER_ATTN does not support causal=True with fewer keys than query rows (seq_q=100, seq_kv=99). Select "
      "FLASH_ATTN, TORCH_SDPA or another backend.");
}

TEST_F(ContractFlashInfer, AdditiveMasksAreRefused) {
  EXPECT_EQ(reasons([](Problem& p) { p.mask = MaskKind::boolean; }), "");
  EXPECT_EQ(reasons([](Problem& p) { p.mask = MaskKind::additive; }),
            "FLASHINFER_ATTN does not support a mask of kind additive. Supported kinds: padding, bool.");
}

TEST_F(ContractFlashInfer, AlignmentIsRefusedWithItsValue) {
  EXPECT_EQ(
      reasons([](Problem& p) { p.alignment = 8; }),
      "FLASHINFER_ATTN needs tensors that start at and have strides of multiples of 16 bytes, got multiples of 8. "
      "Make them contiguous.");
}

TEST_F(ContractFlashInfer, Float32IsRefused) {
  testing::expect_contains(reasons([](Problem& p) { p.dtype = kFloat32; }),
                           {"FLASHINFER_ATTN does not support dtype=float32. Supported dtypes:", "bfloat16"});
}

TEST_F(ContractFlashInfer, ScalesOfZeroAndLessAreRefusedByName) {
  for (const double scale : {0.0, -2.5}) {
    const std::string text = testing::error_text<ValueError>(
        [&] { return backend->make({.num_heads = 4, .head_size = 128, .softmax_scale = scale}); });
    testing::expect_contains(text, {fmt::format("FLASHINFER_ATTN needs a softmax_scale above 0, got {}", scale)});
  }
}

}  // namespace
}  // namespace ditattn
