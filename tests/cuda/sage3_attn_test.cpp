// SAGE_ATTN_3 on GPUs: against its own arithmetic in double precision, and against exact attention; that results depend
// on neither the run nor the batch nor how tensors lie; what is hidden does not show, what is seen and not finite does.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/sage3_attention.hpp"
#include "tests/cuda/gpu_testing.hpp"
#include "tests/cuda/sage3_fp4_emulated.hpp"
#include "tests/kernels/sage3_reference.hpp"
#include "tests/unit/packed_metadata.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using kernels::Sage3Smoothing;
using kernels::cpu::AttentionProblem;
using kernels::cpu::testing::Expected;
using testing::kGpu;
using testing::random_tensor;
using testing::relative_error;
using testing::same_bytes;

constexpr double kInf = std::numeric_limits<double>::infinity();

BackendKwargs kwargs_of(Sage3Smoothing smoothing) {
  return {{"smooth_q", smoothing.query}, {"smooth_k", smoothing.key}, {"smooth_v", smoothing.value}};
}

void require_sage3() {
  if (cuda_info().devices.empty()) GTEST_SKIP() << "skipped: no CUDA device (" << cuda_info().reason << ")";
  const auto verdict =
      Enum::SAGE_ATTN_3.get_class()->explain({.num_heads = 1, .head_size = 128, .dtype = kBFloat16, .device = kGpu});
  if (!verdict) GTEST_SKIP() << "skipped: " << verdict.text();
}

class CudaSage3 : public ::testing::Test {
 protected:
  void SetUp() override { require_sage3(); }
};

enum class Kind : std::uint8_t { defaults, as_they_are, causal, padded };
constexpr const char* kKindNames[] = {"defaults", "as_they_are", "causal", "padded"};

// Head size, dtype, what is special.
class CudaSage3Arithmetic : public ::testing::TestWithParam<std::tuple<std::int64_t, DLDataType, Kind>> {
 protected:
  void SetUp() override { require_sage3(); }
};

// Host tensors as the reference takes them.
AttentionProblem problem_of(const Tensor& query, const Tensor& key, const Tensor& value) {
  const auto strides_of = [](const Tensor& tensor) {
    return kernels::Strides{.batch = tensor.stride(0), .token = tensor.stride(1), .head = tensor.stride(2)};
  };
  AttentionProblem problem;
  problem.batch = query.size(0);
  problem.heads = query.size(2);
  problem.kv_heads = key.size(2);
  problem.rows = query.size(1);
  problem.keys = key.size(1);
  problem.head_size = query.size(3);
  problem.type = query.dtype() == kFloat16 ? kernels::ElementType::float16 : kernels::ElementType::bfloat16;
  problem.scale = 1 / std::sqrt(static_cast<float>(problem.head_size));
  problem.num_queries = problem.num_key_segments = 1;
  problem.queries[0] = {.data = query.data_ptr(), .strides = strides_of(query)};
  problem.key_segments[0] = {.key = key.data_ptr(),
                             .value = value.data_ptr(),
                             .key_strides = strides_of(key),
                             .value_strides = strides_of(value),
                             .keys = key.size(1),
                             .mask = {}};
  return problem;
}

// 4 heads read 2; Q, K and V have means.
struct ArithmeticCase {
  static constexpr std::int64_t kRows = 150;
  static constexpr std::int64_t kKeys = 300;
  Kind kind;
  Sage3Smoothing smoothing;
  Tensor query, key, value;
  Tensor mask = empty(std::array<std::int64_t, 2>{1, kKeys}, kBool);  // with a hole, and padding
  Expected expected;
  Tensor lse = empty(std::array<std::int64_t, 3>{1, 4, kRows}, kFloat32, kGpu);

  ArithmeticCase(std::int64_t size, DLDataType dtype, Kind which)
      : kind(which),
        query(random_tensor({1, kRows, 4, size}, dtype, 1)),
        key(random_tensor({1, kKeys, 2, size}, dtype, 2)),
        value(random_tensor({1, kKeys, 2, size}, dtype, 3)) {
    if (kind == Kind::as_they_are) smoothing = {.query = false, .key = false, .value = false};
    for (Tensor* input : {&query, &key, &value}) {
      for (std::int64_t i = 0; i < input->numel(); ++i) {
        const double mean = std::sin(static_cast<double>(i % size));
        store_element(input->data_ptr(), i, dtype, load_element(input->data_ptr(), i, dtype) + mean);
      }
    }
    for (std::int64_t i = 0; i < kKeys; ++i) {
      static_cast<bool*>(mask.data_ptr())[i] = !((i > 40 && i < 60) || i >= 280);
    }
    expected = kernels::cpu::testing::expected_sage3_results(problem(query, key, value, mask), smoothing);
  }

  // Of tensors on the host, or the GPU.
  [[nodiscard]] AttentionProblem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& m) const {
    AttentionProblem result = problem_of(q, k, v);
    result.causal = kind == Kind::causal;
    result.causal_offset = kKeys - kRows;
    if (kind != Kind::padded) return result;
    result.key_segments[0].mask = {.data = m.data_ptr(), .strides = {.batch = kKeys}, .key_stride = 1, .rows = kRows};
    return result;
  }

  void check(const Tensor& result) const {
    const Tensor out = copy_to(result, kCpu);
    const Tensor lse_out = copy_to(lse, kCpu);
    double difference = 0;
    double norm = 0;
    double lse_error = 0;
    for (std::int64_t i = 0; i < out.numel(); ++i) {
      const double e = expected.out[static_cast<std::size_t>(i)];
      difference += std::pow(load_element(out.data_ptr(), i, out.dtype()) - e, 2);
      norm += e * e;
    }
    for (std::int64_t row = 0; row < kRows; ++row) {
      for (std::int64_t head = 0; head < 4; ++head) {
        const double e = expected.lse[static_cast<std::size_t>(row * 4 + head)];
        lse_error = std::max(lse_error, std::fabs(load_element(lse_out.data_ptr(), head * kRows + row, kFloat32) - e));
      }
    }
    const double error = std::sqrt(difference / norm);
    fmt::print("head size {}, {}: relative L2 {:.2e}, LSE {:.1e}\n", out.size(3), kKindNames[static_cast<int>(kind)],
               error, lse_error);
    EXPECT_LT(error, out.dtype() == kFloat16 ? 1.5e-3 : 3e-3);
    EXPECT_LT(lse_error, 1e-3);
  }
};

TEST_P(CudaSage3Arithmetic, IsThatOfTheReference) {
  const auto [size, dtype, kind] = GetParam();
  const ArithmeticCase test(size, dtype, kind);
  AttentionMetadata metadata;
  if (kind == Kind::padded) metadata = AttentionMetadata({.attn_mask = copy_to(test.mask, kGpu)});
  const auto attention = Enum::SAGE_ATTN_3.get_class()->make({.num_heads = 4,
                                                              .head_size = size,
                                                              .causal = kind == Kind::causal,
                                                              .num_kv_heads = 2,
                                                              .backend_kwargs = kwargs_of(test.smoothing)});
  test.check(attention->forward(copy_to(test.query, kGpu), copy_to(test.key, kGpu), copy_to(test.value, kGpu), metadata,
                                {.lse = test.lse}));
}

// The kernels for products of NVFP4, all of them but the instructions themselves.
void check_emulated(const ArithmeticCase& test, void (*attention)(const AttentionProblem&, Sage3Smoothing)) {
  const Tensor inputs[] = {copy_to(test.query, kGpu), copy_to(test.key, kGpu), copy_to(test.value, kGpu),
                           copy_to(test.mask, kGpu)};
  const Tensor out = copy_to(test.query, kGpu);
  AttentionProblem problem = test.problem(inputs[0], inputs[1], inputs[2], inputs[3]);
  problem.out = out.data_ptr();
  problem.out_type = problem.type;
  problem.out_strides = problem.queries[0].strides;
  problem.lse = static_cast<float*>(test.lse.data_ptr());
  problem.lse_strides = {.batch = test.lse.stride(0), .token = 1, .head = test.lse.stride(1)};
  attention(problem, test.smoothing);
  test.check(out);
}

class CudaSage3Fp4 : public CudaSage3Arithmetic {};
TEST_P(CudaSage3Fp4, IsThatOfTheReference) {
  const auto [size, dtype, kind] = GetParam();
  check_emulated({size, dtype, kind}, kernels::cuda::sage3_sm120_emulated);
}

class CudaSage3Tcgen05 : public CudaSage3Arithmetic {};
TEST_P(CudaSage3Tcgen05, IsThatOfTheReference) {
  const std::int64_t capability = cuda_info().devices.front().compute_capability;
  if (capability != 90) GTEST_SKIP() << "skipped: this is compiled for compute capability 90, not " << capability;
  const auto [size, dtype, kind] = GetParam();
  check_emulated({size, dtype, kind}, kernels::cuda::sage3_sm100_emulated);
}

// Needs no GPU.
TEST(CudaSage3Kernels, AreThoseOfTheComputeCapability) {
  const std::string built = kernels::cuda::sage3_kernels_built();
  const auto name_of = [](std::int64_t head_size, int capability) {
    return kernels::cuda::sage3_kernel_name(head_size, kernels::ElementType::bfloat16, capability);
  };
  const auto expect = [&](int capability, const std::string& name, const std::string& architecture) {
    if (built.find(architecture) == std::string::npos) return;
    EXPECT_EQ(name_of(72, capability), name + ", NVFP4 (compiled, never run here)");
    EXPECT_EQ(name_of(128, capability), name_of(72, capability));
    for (const auto& [head_size, usable] : {std::pair{256, capability}, std::pair{128, 89}}) {
      EXPECT_EQ(name_of(head_size, usable), name_of(head_size, 80)) << "the emulation's";
    }
  };
  expect(100, "sage3_sm100", "sm_100a");
  expect(120, "sage3_sm120", "sm_120");
  EXPECT_EQ(name_of(128, 110), name_of(128, 80)) << "neither's instructions";
  EXPECT_EQ(kernels::cuda::usable_capability(100, 89), 89);
}

std::string arithmetic_name(const ::testing::TestParamInfo<CudaSage3Arithmetic::ParamType>& info) {
  return fmt::format("{}_{}_{}", std::get<0>(info.param), dtype_name(std::get<1>(info.param)),
                     kKindNames[static_cast<int>(std::get<2>(info.param))]);
}
const auto kKinds = ::testing::Values(Kind::defaults, Kind::as_they_are, Kind::causal, Kind::padded);
const auto kDtypes = ::testing::Values(kFloat16, kBFloat16);
INSTANTIATE_TEST_SUITE_P(, CudaSage3Arithmetic,
                         ::testing::Combine(::testing::Values(40, 64, 72, 96, 128, 160, 256), kDtypes, kKinds),
                         arithmetic_name);
const auto kFp4HeadSizes = ::testing::Values(40, 64, 72, 96, 128);
INSTANTIATE_TEST_SUITE_P(, CudaSage3Fp4, ::testing::Combine(kFp4HeadSizes, kDtypes, kKinds), arithmetic_name);
INSTANTIATE_TEST_SUITE_P(, CudaSage3Tcgen05, ::testing::Combine(kFp4HeadSizes, kDtypes, kKinds), arithmetic_name);

Tensor forward(Enum member, const Tensor& query, const Tensor& key, const Tensor& value,
               const BackendKwargs& kwargs = {}) {
  const auto attention =
      member.get_class()->make({.num_heads = query.size(2), .head_size = query.size(3), .backend_kwargs = kwargs});
  return copy_to(attention->forward(copy_to(query, kGpu), copy_to(key, kGpu), copy_to(value, kGpu)), kCpu);
}

// An offset of 20 to one in 32 channels of Q or K, of 3 to all of V.
TEST_F(CudaSage3, ErrorIsWithinItsBounds) {
  const std::map<std::string, double> bounds = {
      {"normals", 0.2}, {"offset Q", 0.21}, {"offset K", 0.21}, {"offset V", 5e-3}};
  for (const std::int64_t size : {64, 128, 256}) {
    for (const auto& [name, bound] : bounds) {
      Tensor query = random_tensor({1, 1024, 8, size}, kBFloat16, 1);
      Tensor key = random_tensor({1, 2048, 8, size}, kBFloat16, 2);
      Tensor value = random_tensor({1, 2048, 8, size}, kBFloat16, 3);
      const auto offset = [](Tensor& tensor, int step, double by) {
        for (std::int64_t i = 0; i < tensor.numel(); i += step) {
          store_element(tensor.data_ptr(), i, kBFloat16, load_element(tensor.data_ptr(), i, kBFloat16) + by);
        }
      };
      if (name == "offset Q") offset(query, 32, 5);
      if (name == "offset K") offset(key, 32, 20);
      if (name == "offset V") offset(value, 1, 3);
      const Tensor exact = forward(Enum::FLASH_ATTN, query, key, value);
      const double error = relative_error(forward(Enum::SAGE_ATTN_3, query, key, value), exact);
      fmt::print("head size {}, {}: relative L2 {:.4f}\n", size, name, error);
      EXPECT_LT(error, bound) << size;
      EXPECT_GT(error, bound / 5) << "nothing was quantized";
    }
  }
}

// Also from a tensor whose rows start anywhere.
TEST_F(CudaSage3, BitsDependOnNeitherTheRunNorTheBatchNorTheLayout) {
  for (const std::int64_t size : {64, 80, 128, 256}) {
    const Tensor query = copy_to(random_tensor({3, 333, 4, size}, kFloat16, 1), kGpu);
    const Tensor key = copy_to(random_tensor({3, 1517, 4, size}, kFloat16, 2), kGpu);
    const Tensor value = copy_to(random_tensor({3, 1517, 4, size}, kFloat16, 3), kGpu);
    const auto attention = Enum::SAGE_ATTN_3.get_class()->make({.num_heads = 4, .head_size = size});
    const Tensor whole = attention->forward(query, key, value);
    for (int i = 0; i < 5; ++i) ASSERT_TRUE(same_bytes(attention->forward(query, key, value), whole)) << "run " << i;
    const auto entry = [](const Tensor& tensor, std::int64_t b) {
      char* data = static_cast<char*>(tensor.data_ptr()) + b * tensor.stride(0) * 2;
      return wrap(data, {1, tensor.size(1), tensor.size(2), tensor.size(3)}, tensor.dtype(),
                  {tensor.stride(0), tensor.stride(1), tensor.stride(2), 1}, tensor.device());
    };
    // The same numbers one element further, in rows that are one element longer.
    std::vector<Tensor> kept;
    const auto moved = [&](const Tensor& tensor) {
      const std::int64_t pitch = tensor.size(3) + 1;
      kept.push_back(
          empty(std::array<std::int64_t, 4>{1, tensor.size(1), tensor.size(2), pitch}, tensor.dtype(), kGpu));
      char* data = static_cast<char*>(kept.back().data_ptr()) + 2;
      testing::must(cudaMemcpy2D(data, pitch * 2, tensor.data_ptr(), tensor.size(3) * 2, tensor.size(3) * 2,
                                 tensor.size(1) * tensor.size(2) - 1, cudaMemcpyDeviceToDevice));
      return wrap(data, {1, tensor.size(1) - 1, tensor.size(2), tensor.size(3)}, tensor.dtype(),
                  {pitch * tensor.size(2) * tensor.size(1), pitch * tensor.size(2), pitch, 1}, tensor.device());
    };
    const auto shorter = [](const Tensor& tensor) {
      return wrap(tensor.data_ptr(), {1, tensor.size(1) - 1, tensor.size(2), tensor.size(3)}, tensor.dtype(),
                  {tensor.stride(0), tensor.stride(1), tensor.stride(2), 1}, tensor.device());
    };
    for (std::int64_t b = 0; b < 3; ++b) {
      const Tensor q = entry(query, b);
      const Tensor k = entry(key, b);
      const Tensor v = entry(value, b);
      EXPECT_TRUE(same_bytes(attention->forward(q, k, v), entry(whole, b))) << "batch entry " << b << ", size " << size;
      EXPECT_TRUE(same_bytes(attention->forward(moved(q), moved(k), moved(v)),
                             attention->forward(shorter(q), shorter(k), shorter(v))))
          << "layout, size " << size;
    }
  }
}

// NaN and Inf past a length and in holes of a mask show nowhere: the bits are those of zeros there.
TEST_F(CudaSage3, WhatIsHiddenDoesNotShow) {
  const std::int64_t tokens = 300;
  const Tensor query = random_tensor({2, 200, 2, 64}, kBFloat16, 1);
  const Tensor key = random_tensor({2, tokens, 2, 64}, kBFloat16, 2);
  const Tensor value = random_tensor({2, tokens, 2, 64}, kBFloat16, 3);
  Tensor mask = empty(std::array<std::int64_t, 2>{2, tokens}, kBool);
  for (std::int64_t i = 0; i < mask.numel(); ++i) {
    static_cast<bool*>(mask.data_ptr())[i] = i % tokens < 250 && i % 17 != 3;
  }
  const auto with = [&](const Tensor& tensor, double even, double odd) {
    Tensor changed = copy_to(tensor, kCpu);
    for (std::int64_t i = 0; i < changed.numel(); ++i) {
      const std::int64_t token = i / 128 % tokens + i / (128 * tokens) * tokens;
      if (static_cast<const bool*>(mask.data_ptr())[token]) continue;
      store_element(changed.data_ptr(), i, kBFloat16, i % 2 == 0 ? even : odd);
    }
    return copy_to(changed, kGpu);
  };
  const auto attention = Enum::SAGE_ATTN_3.get_class()->make({.num_heads = 2, .head_size = 64});
  const AttentionMetadata masked({.attn_mask = copy_to(mask, kGpu)});
  const Tensor on_gpu = copy_to(query, kGpu);
  const Tensor clean = attention->forward(on_gpu, with(key, 0, 0), with(value, 0, 0), masked);
  const Tensor poisoned =
      attention->forward(on_gpu, with(key, kInf, std::nan("")), with(value, std::nan(""), -kInf), masked);
  EXPECT_TRUE(same_bytes(clean, poisoned));
}

// A row that sees NaN or Inf has what exact attention has; others have numbers.
TEST_F(CudaSage3, WhatIsSeenAndNotFiniteShows) {
  const std::int64_t tokens = 260;
  const Tensor query = random_tensor({1, tokens, 2, 128}, kBFloat16, 1);
  Tensor key = random_tensor({1, tokens, 2, 128}, kBFloat16, 2);
  Tensor value = random_tensor({1, tokens, 2, 128}, kBFloat16, 3);
  store_element(key.data_ptr(), (200 * 2) * 128 + 5, kBFloat16, std::nan(""));
  store_element(value.data_ptr(), (230 * 2 + 1) * 128 + 7, kBFloat16, kInf);
  const auto causal = [&](Enum member) {
    const auto attention = member.get_class()->make({.num_heads = 2, .head_size = 128, .causal = true});
    return copy_to(attention->forward(copy_to(query, kGpu), copy_to(key, kGpu), copy_to(value, kGpu)), kCpu);
  };
  const Tensor exact = causal(Enum::FLASH_ATTN);
  const Tensor out = causal(Enum::SAGE_ATTN_3);
  for (std::int64_t i = 0; i < out.numel(); ++i) {
    const double e = load_element(exact.data_ptr(), i, kBFloat16);
    const double x = load_element(out.data_ptr(), i, kBFloat16);
    ASSERT_EQ(std::isfinite(x), std::isfinite(e)) << "row " << i / 256;
    if (std::isfinite(e)) continue;
    ASSERT_TRUE(std::isnan(e) ? std::isnan(x) : x == e) << "row " << i / 256;
  }
}

// Each sequence attends to itself alone.
TEST_F(CudaSage3, PackedSequences) {
  const Tensor query = random_tensor({1, 700, 2, 64}, kBFloat16, 1);
  const Tensor key = random_tensor({1, 700, 2, 64}, kBFloat16, 2);
  const Tensor value = random_tensor({1, 700, 2, 64}, kBFloat16, 3);
  const AttentionMetadata packed({.extra = testing::packed({0, 200, 333, 700}, {0, 200, 333, 700})});
  const auto of = [&](Enum member) {
    const auto attention = member.get_class()->make({.num_heads = 2, .head_size = 64});
    return copy_to(
        attention->forward(copy_to(query, kGpu), copy_to(key, kGpu), copy_to(value, kGpu), copy_to(packed, kGpu)),
        kCpu);
  };
  const Tensor out = of(Enum::SAGE_ATTN_3);
  const double error = relative_error(out, of(Enum::FLASH_ATTN));
  fmt::print("packed: relative L2 {:.4f}\n", error);
  EXPECT_LT(error, 0.2);
}

}  // namespace
}  // namespace ditattn
