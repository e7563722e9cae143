// CUDNN_ATTN's FP8: the tensors it is given; cuDNN's plan over them, on Hopper with the FP8 output that it has there;
// and the back end itself where GPUs have it, from compute capability 10.0 on.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "backends/common/kernel_call.hpp"
#include "backends/cudnn_attn/sdpa_graph.hpp"
#include "backends/reference/reference.hpp"
#include "kernels/cuda/fp8_tensors.hpp"
#include "tests/cuda/gpu_testing.hpp"

namespace ditattn {
namespace {

using kernels::cuda::Fp8Scales;
using testing::InStream;
using testing::kGpu;
using testing::must;
using testing::random_tensor;
using Bytes = std::vector<std::uint8_t>;

constexpr std::uint8_t kNan = 0x7F;
constexpr float kLargest = 448;
constexpr float kOutlier = 3008;  // a bfloat16

// A code of e4m3 (OCP 8-bit Floating Point 1.0): 1 sign, 4 exponent of bias 7, 3 fraction; S.1111.111 is NaN.
double number_of(std::uint8_t code) {
  const int exponent = code >> 3 & 15;
  const int fraction = code & 7;
  if ((code & kNan) == kNan) return std::numeric_limits<double>::quiet_NaN();
  const double size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return (code & 0x80) != 0 ? -size : size;
}

// The nearest, ties to even; what is beyond the largest becomes it.
std::uint8_t code_of(float x) {
  if (std::isnan(x)) return kNan;
  std::uint8_t best = 0;
  for (int code = 1; code < kNan; ++code) {
    const double before = std::abs(number_of(best) - std::abs(static_cast<double>(x)));
    const double here = std::abs(number_of(static_cast<std::uint8_t>(code)) - std::abs(static_cast<double>(x)));
    if (here < before || (here == before && code % 2 == 0)) best = static_cast<std::uint8_t>(code);
  }
  return std::signbit(x) ? best | 0x80 : best;
}

// Device memory of bytes.
class Memory {
 public:
  explicit Memory(std::size_t bytes) { must(cudaMalloc(&data_, bytes)); }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  [[nodiscard]] void* get() const { return data_; }
  [[nodiscard]] Bytes read(std::size_t bytes) const {
    Bytes host(bytes);
    must(cudaMemcpy(host.data(), data_, bytes, cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  void* data_ = nullptr;
};

class CudnnFp8 : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_info().devices.empty()) GTEST_SKIP() << "skipped: no CUDA device (" << cuda_info().reason << ")";
    capability = cuda_info().devices.front().compute_capability;
  }

  // Q, K and V of a problem in FP8, and how they are scaled.
  struct Written {
    Memory query, key, value, scales{sizeof(Fp8Scales)};
    Fp8Scales of{};
    explicit Written(const kernels::AttentionProblem& p)
        : query(size(p, p.rows, p.heads)), key(size(p, p.keys, p.kv_heads)), value(size(p, p.keys, p.kv_heads)) {
      const InStream stream;
      must(cudaMemset(scales.get(), 0, sizeof(Fp8Scales)));  // some of them are the plan's to write
      write_fp8(p, query.get(), key.get(), value.get(), static_cast<Fp8Scales*>(scales.get()),
                {.stream = stream.get()});
      must(cudaStreamSynchronize(stream.get()));
      must(cudaMemcpy(&of, scales.get(), sizeof(of), cudaMemcpyDeviceToHost));
    }
    static std::size_t size(const kernels::AttentionProblem& p, std::int64_t tokens, std::int64_t heads) {
      return static_cast<std::size_t>(p.batch * tokens * heads * p.head_size);
    }
  };

  // Of tensors on the GPU, (B, S, H, D).
  static kernels::AttentionProblem problem_of(const Tensor& query, const Tensor& key, const Tensor& value) {
    kernels::AttentionProblem p;
    p.batch = query.size(0);
    p.rows = query.size(1);
    p.heads = query.size(2);
    p.keys = key.size(1);
    p.kv_heads = key.size(2);
    p.head_size = query.size(3);
    p.type = p.out_type = element_type(query.dtype());
    p.num_queries = p.num_key_segments = 1;
    p.queries[0] = {.data = data_pointer(query), .strides = strides_of(query)};
    p.key_segments[0] = {.key = data_pointer(key),
                         .value = data_pointer(value),
                         .key_strides = strides_of(key),
                         .value_strides = strides_of(value),
                         .keys = p.keys,
                         .mask = {}};
    return p;
  }

  // ‖got − expected‖ / ‖expected‖ against the float64 oracle.
  static double error_of(const std::vector<double>& got, const Tensor& query, const Tensor& key, const Tensor& value,
                         bool causal) {
    const double scale = 1 / std::sqrt(static_cast<double>(query.size(3)));
    const auto expected = reference::attention(query, key, value, {}, scale, causal, CausalAlignment::top_left);
    double difference = 0;
    double norm = 0;
    std::size_t at = 0;
    for (std::int64_t b = 0; b < query.size(0); ++b) {  // the oracle's order: batch, head, row
      for (std::int64_t h = 0; h < query.size(2); ++h) {
        for (std::int64_t s = 0; s < query.size(1); ++s) {
          for (std::int64_t d = 0; d < query.size(3); ++d, ++at) {
            const std::int64_t place = ((b * query.size(1) + s) * query.size(2) + h) * query.size(3) + d;
            difference += std::pow(got[static_cast<std::size_t>(place)] - expected.out[at], 2);
            norm += std::pow(expected.out[at], 2);
          }
        }
      }
    }
    return std::sqrt(difference / norm);
  }

  std::int64_t capability = 0;
};

// A host tensor as it should be, in its own order.
Bytes expected_of(const Tensor& host) {
  std::vector<float> numbers;
  float most = 0;
  for (std::int64_t i = 0; i < host.numel(); ++i) {
    numbers.push_back(static_cast<float>(load_element(host.data_ptr(), i, host.dtype())));
    if (std::isfinite(numbers.back())) most = std::max(most, std::abs(numbers.back()));
  }
  const float scale = most > 0 ? kLargest / most : 1;
  Bytes codes;
  for (const float x : numbers) codes.push_back(code_of(x * scale));
  return codes;
}

std::size_t count_differing(const Bytes& a, const Bytes& b) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const bool both_nan = (a[i] & kNan) == kNan && (b[i] & kNan) == kNan;
    count += a[i] == b[i] || both_nan ? 0 : 1;
  }
  return count;
}

TEST_F(CudnnFp8, TensorsAreThoseRoundedOnTheHost) {
  for (const DLDataType dtype : {kBFloat16, kFloat16}) {
    SCOPED_TRACE(dtype_name(dtype));
    const Tensor query = random_tensor({2, 37, 6, 48}, dtype, 1);
    const Tensor key = random_tensor({2, 1030, 2, 48}, dtype, 2);
    const Tensor value = empty({2, 1030, 2, 48}, dtype);
    for (std::int64_t i = 0; i < value.numel(); ++i) store_element(value.data_ptr(), i, dtype, 0);
    store_element(query.data_ptr(), 5, dtype, INFINITY);
    store_element(query.data_ptr(), 6, dtype, -INFINITY);
    store_element(query.data_ptr(), 7, dtype, NAN);
    store_element(key.data_ptr(), 1000, dtype, -kOutlier);  // most numbers become subnormal
    const Tensor on_gpu[] = {copy_to(query, kGpu), copy_to(key, kGpu), copy_to(value, kGpu)};
    const kernels::AttentionProblem problem = problem_of(on_gpu[0], on_gpu[1], on_gpu[2]);
    const Written written(problem);
    const auto read = [](const Memory& memory, const Tensor& like) {
      return memory.read(static_cast<std::size_t>(like.numel()));
    };
    EXPECT_EQ(count_differing(read(written.query, query), expected_of(query)), 0U);
    EXPECT_EQ(count_differing(read(written.key, key), expected_of(key)), 0U);
    EXPECT_EQ(count_differing(read(written.value, value), expected_of(value)), 0U);
    EXPECT_EQ(written.of.key_descale, kOutlier / kLargest);
    EXPECT_EQ(written.of.value_descale, 1);
    EXPECT_EQ(written.of.probability_scale * written.of.probability_descale, 1);
    EXPECT_EQ(written.of.out_scale, 1);
  }
}

TEST_F(CudnnFp8, TensorsMayHaveAnyStrides) {
  const Tensor wide = random_tensor({1, 64, 3, 2, 32}, kBFloat16, 3);  // Q, K and V of one projection
  const Tensor on_gpu = copy_to(wide, kGpu);
  const auto part = [&](const Tensor& of, std::int64_t which) {
    return wrap(static_cast<char*>(data_pointer(of)) + which * 64 * 2, {1, 64, 2, 32}, kBFloat16,
                {64 * 192, 192, 32, 1}, of.device());
  };
  const auto contiguous = [](const Tensor& of) {
    const Tensor made = empty({1, 64, 2, 32}, kBFloat16);
    for (std::int64_t i = 0; i < made.numel(); ++i) {
      store_element(made.data_ptr(), i, kBFloat16, load_element(data_pointer(of), i / 64 * 192 + i % 64, kBFloat16));
    }
    return made;
  };
  const Written written(problem_of(part(on_gpu, 0), part(on_gpu, 1), part(on_gpu, 2)));
  EXPECT_EQ(count_differing(written.query.read(64 * 64), expected_of(contiguous(part(wide, 0)))), 0U);
  EXPECT_EQ(count_differing(written.key.read(64 * 64), expected_of(contiguous(part(wide, 1)))), 0U);
  EXPECT_EQ(count_differing(written.value.read(64 * 64), expected_of(contiguous(part(wide, 2)))), 0U);
}

// The plan, its scales among them, on the one kind of GPU with FP8 attention that was there to run it.
TEST_F(CudnnFp8, PlanWithAnFp8OutputOnHopper) {
  if (capability != 90) GTEST_SKIP() << "skipped: for compute capability 9.0";
  if (cudnn::version() == 0) GTEST_SKIP() << "skipped: " << cudnn::problem();
  for (const bool causal : {false, true}) {
    const Tensor query = random_tensor({2, 256, 4, 128}, kBFloat16, 4);
    const Tensor key = random_tensor({2, 384, 2, 128}, kBFloat16, 5);
    const Tensor value = random_tensor({2, 384, 2, 128}, kBFloat16, 6);
    const Tensor on_gpu[] = {copy_to(query, kGpu), copy_to(key, kGpu), copy_to(value, kGpu)};
    const Written written(problem_of(on_gpu[0], on_gpu[1], on_gpu[2]));
    const std::array<std::int64_t, 3> of_rows{256 * 4 * 128, 4 * 128, 128};
    const std::array<std::int64_t, 3> of_keys{384 * 2 * 128, 2 * 128, 128};
    const auto plan = cudnn::sdpa_plan({.device = 0,
                                        .compute_capability = static_cast<int>(capability),
                                        .bfloat16 = true,
                                        .batch = 2,
                                        .heads = 4,
                                        .kv_heads = 2,
                                        .rows = 256,
                                        .keys = 384,
                                        .head_size = 128,
                                        .query_strides = of_rows,
                                        .key_strides = of_keys,
                                        .value_strides = of_keys,
                                        .out_strides = of_rows,
                                        .scale_bits = std::bit_cast<std::uint32_t>(1 / std::sqrt(128.0F)),
                                        .causal = causal,
                                        .fp8 = true,
                                        .fp8_out = true});
    const Memory out(Written::size(problem_of(query, key, value), 256, 4));
    const Memory workspace(static_cast<std::size_t>(plan->workspace_bytes()) + 1);
    const InStream stream;
    plan->run({.query = written.query.get(),
               .key = written.key.get(),
               .value = written.value.get(),
               .out = out.get(),
               .fp8_scales = static_cast<Fp8Scales*>(written.scales.get()),
               .workspace = workspace.get()},
              stream.get());
    must(cudaStreamSynchronize(stream.get()));
    std::vector<double> got;
    for (const std::uint8_t code : out.read(static_cast<std::size_t>(query.numel()))) got.push_back(number_of(code));
    const double error = error_of(got, query, key, value, causal);
    std::printf("cuDNN's FP8 attention%s: relative L2 error %.2e\n", causal ? ", causal" : "", error);
    EXPECT_LT(error, 0.08);
  }
}

TEST_F(CudnnFp8, Forward) {
  if (capability < 100) GTEST_SKIP() << "skipped: for compute capability 10.0 and above";
  const Tensor query = random_tensor({2, 256, 4, 128}, kBFloat16, 7);
  const Tensor key = random_tensor({2, 384, 2, 128}, kBFloat16, 8);
  const Tensor value = random_tensor({2, 384, 2, 128}, kBFloat16, 9);
  const auto layer = DiffusionAttentionBackendEnum::CUDNN_ATTN.get_class()->make(
      {.num_heads = 4, .head_size = 128, .num_kv_heads = 2});
  const Tensor out =
      copy_to(layer->forward(copy_to(query, kGpu), copy_to(key, kGpu), copy_to(value, kGpu),
                             AttentionMetadata({.extra = {{"kv_cache_dtype", tvm::ffi::String("fp8")}}})),
              kCpu);
  std::vector<double> got;
  for (std::int64_t i = 0; i < out.numel(); ++i) got.push_back(load_element(out.data_ptr(), i, out.dtype()));
  const double error = error_of(got, query, key, value, false);
  std::printf("CUDNN_ATTN in FP8: relative L2 error %.2e\n", error);
  EXPECT_LT(error, 0.08);
}

}  // namespace
}  // namespace ditattn
