// FLASH_ATTN on GPUs: what it refuses there, with the value and a back end that would do. Asking needs no GPU; skipped
// in builds for the CPU alone.

#include <gtest/gtest.h>

#include <algorithm>

#include "ditattn/ditattn.hpp"

namespace ditattn {
namespace {

class ContractFlashGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::ranges::count(backend->capabilities().devices, "cuda") == 0) GTEST_SKIP() << "skipped: not built for GPUs";
    const auto& devices = cuda_info().devices;
    if (!devices.empty() && devices[0].compute_capability < 80) GTEST_SKIP() << "skipped: a GPU that it refuses";
  }
  BackendClass backend = DiffusionAttentionBackendEnum::FLASH_ATTN.get_class();
  Problem problem{.num_heads = 4,
                  .num_kv_heads = 2,
                  .seq_q = 100,
                  .seq_kv = 200,
                  .head_size = 128,
                  .dtype = kBFloat16,
                  .device = {kDLCUDA, 0}};
};

TEST_F(ContractFlashGpu, Float32IsRefused) {
  EXPECT_EQ(backend->explain(problem).text(), "");
  problem.dtype = kFloat32;
  EXPECT_EQ(backend->explain(problem).text(),
            "FLASH_ATTN does not support dtype=float32 on cuda. Supported dtypes there: float16, bfloat16. Select "
            "TORCH_SDPA or another backend.");
  problem.device = kCpu;
  EXPECT_EQ(backend->explain(problem).text(), "");
}

TEST_F(ContractFlashGpu, HeadSizesAbove256AreRefused) {
  for (const std::int64_t size : {1, 3, 72, 200, 256}) {
    problem.head_size = size;
    EXPECT_EQ(backend->explain(problem).text(), "") << size;
  }
  problem.head_size = 257;
  EXPECT_EQ(
      backend->explain(problem).text(),
      "FLASH_ATTN does not support head_size=257 on cuda. Supported head sizes there: 1 to 256. Select TORCH_SDPA "
      "or another backend.");
  problem.device = kCpu;
  EXPECT_EQ(backend->explain(problem).text(), "");
}

TEST_F(ContractFlashGpu, EverythingElseIsTaken) {
  problem.causal = problem.lse = problem.joint = true;
  for (const MaskKind mask : {MaskKind::none, MaskKind::padding, MaskKind::boolean, MaskKind::additive}) {
    for (const bool packed : {false, true}) {
      problem.mask = mask;
      problem.packed = packed;
      problem.spans = !packed;
      problem.alignment = packed ? 2 : 0;  // 0: a negative stride
      EXPECT_EQ(backend->explain(problem).text(), "");
    }
  }
}

TEST_F(ContractFlashGpu, EngineNamesTheGpusKernels) {
  EXPECT_NE(backend->capabilities().engine.find("; GPU: "), std::string::npos) << backend->capabilities().engine;
}

}  // namespace
}  // namespace ditattn
