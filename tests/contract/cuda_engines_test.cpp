// What CUDNN_ATTN and FLASHINFER_ATTN refuse, each with the value. Asking needs neither a GPU nor their libraries; in
// builds without them, skipped.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <functional>

#include "ditattn/ditattn.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

class ContractEngine : public ::testing::Test {
 protected:
  explicit ContractEngine(DiffusionAttentionBackendEnum member) : member_(member) {}

  void SetUp() override {
    try {
      backend = member_.get_class();
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

 private:
  DiffusionAttentionBackendEnum member_;
};

class ContractCudnn : public ContractEngine {
 protected:
  ContractCudnn() : ContractEngine(DiffusionAttentionBackendEnum::CUDNN_ATTN) {}
};

class ContractFlashInfer : public ContractEngine {
 protected:
  ContractFlashInfer() : ContractEngine(DiffusionAttentionBackendEnum::FLASHINFER_ATTN) {}
};

TEST_F(ContractCudnn, KeyLengthOneIsRefused) {
  EXPECT_EQ(reasons([](Problem&) {}), "");
  EXPECT_EQ(reasons([](Problem& p) { p.seq_kv = 1; }),
            "CUDNN_ATTN was explicitly selected but cuDNN FMHA does not support key/value sequence length 1. Select "
            "TORCH_SDPA or another backend for this shape.");
}

TEST_F(ContractCudnn, AlignmentIsRefusedWithItsValue) {
  EXPECT_EQ(
      reasons([](Problem& p) { p.alignment = 2; }),
      "CUDNN_ATTN needs tensors that start at and have strides of multiples of 16 bytes, got multiples of 2. Make "
      "them contiguous.");
  EXPECT_EQ(reasons([](Problem& p) { p.alignment = 0; }),
            "CUDNN_ATTN needs tensors that start at and have strides of multiples of 16 bytes, got a negative stride. "
            "Make them contiguous.");
}

TEST_F(ContractCudnn, PackedSequencesAreTakenWithoutAMask) {
  EXPECT_EQ(reasons([](Problem& p) { p.packed = p.causal = true; }), "");
  EXPECT_EQ(reasons([](Problem& p) {
              p.packed = true;
              p.mask = MaskKind::padding;
            }),
            "CUDNN_ATTN does not support packed sequences (cu_seqlens) together with a mask of kind padding. Leave the "
            "mask out: cu_seqlens_k says which keys there are.");
}

TEST_F(ContractCudnn, JointTokensAreTakenWithMasks) {
  EXPECT_EQ(reasons([](Problem& p) {
              p.joint = true;
              p.mask = MaskKind::additive;
            }),
            "");
}

TEST_F(ContractCudnn, Fp8IsRefused) {
  EXPECT_EQ(
      reasons([](Problem& p) { p.fp8_kv = true; }),
      "Attention backend CUDNN_ATTN does not support kv_cache_dtype='fp8' on cuda. Select a compatible backend or "
      "set diffusion_kv_cache_dtype='auto'.; cuDNN's FP8 attention gives FP8 output alone below compute capability "
      "10.0.");
}

TEST_F(ContractCudnn, ScalesOfZeroAndLessAreRefused) {
  for (const double scale : {0.0, -2.5}) {
    const std::string text = testing::error_text<ValueError>(
        [&] { return backend->make({.num_heads = 4, .head_size = 64, .softmax_scale = scale}); });
    testing::expect_contains(text, {fmt::format("CUDNN_ATTN needs a softmax_scale above 0, got {}", scale)});
  }
}

TEST_F(ContractCudnn, AutotuneIsTrueOrFalse) {
  for (const bool wanted : {true, false}) {
    EXPECT_NE(backend->make({.num_heads = 4, .head_size = 64, .backend_kwargs = {{"autotune", wanted}}}), nullptr);
  }
  EXPECT_EQ(testing::error_text<ValueError>([&] {
              static_cast<void>(backend->make(
                  {.num_heads = 4, .head_size = 64, .backend_kwargs = {{"autotune", tvm::ffi::String("yes")}}}));
            }),
            "CUDNN_ATTN: backend_kwargs['autotune'] is 'yes'. Valid values are: true, false");
}

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

TEST_F(ContractFlashInfer, PackedSequencesAreTakenWithoutAMask) {
  EXPECT_EQ(reasons([](Problem& p) {
              p.packed = p.causal = true;
              p.seq_kv = 99;  // the sequences' own lengths count
            }),
            "");
  EXPECT_EQ(reasons([](Problem& p) {
              p.packed = true;
              p.mask = MaskKind::boolean;
            }),
            "FLASHINFER_ATTN does not support packed sequences (cu_seqlens) together with a mask of kind bool. Leave "
            "the mask out: cu_seqlens_k says which keys there are.");
}

TEST_F(ContractFlashInfer, JointTokensAreTakenWithMasks) {
  EXPECT_EQ(reasons([](Problem& p) {
              p.joint = true;
              p.mask = MaskKind::boolean;
            }),
            "");
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
