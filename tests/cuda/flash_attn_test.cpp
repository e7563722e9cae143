// FLASH_ATTN on GPUs: which kernel takes what, tensors that lie anyhow, and the same bits from run to run and whatever
// else is in the batch.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <vector>

#include "kernels/cuda/flash_attention.hpp"
#include "tests/cuda/gpu_testing.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using kernels::AttentionProblem;
using kernels::ElementType;
using testing::kGpu;
using testing::random_tensor;
using testing::relative_error;
using testing::same_bytes;

// Needs no GPU: the kernel that would be taken, of contiguous tensors that `change` changes.
class FlashKernelName : public ::testing::Test {
 protected:
  static std::string of(
      const std::function<void(AttentionProblem&)>& change = [](AttentionProblem&) {}, int compute_capability = 90,
      int level = 1000) {
    alignas(16) static const char data[16] = {};
    const kernels::Strides of_rows{.batch = 100 * 4 * 128, .token = 4 * 128, .head = 128};
    const kernels::Strides of_keys{.batch = 200 * 2 * 128, .token = 2 * 128, .head = 128};
    AttentionProblem problem;
    problem.batch = 2;
    problem.heads = 4;
    problem.kv_heads = 2;
    problem.rows = 100;
    problem.keys = 200;
    problem.head_size = 128;
    problem.type = problem.out_type = ElementType::bfloat16;
    problem.num_queries = problem.num_key_segments = 1;
    problem.queries[0] = {.data = data, .strides = of_rows};
    problem.out_strides = of_rows;
    problem.key_segments[0] = {
        .key = data, .value = data, .key_strides = of_keys, .value_strides = of_keys, .keys = 200, .mask = {}};
    change(problem);
    return kernels::cuda::flash_kernel_name(problem, compute_capability, level);
  }
};

TEST_F(FlashKernelName, OfHoppersKernel) {
  if (kernels::cuda::flash_kernels_built() == "plain") GTEST_SKIP() << "skipped: no architecture is Hopper's";
  const std::string hopper = "flash_sm90, blocks of 64 keys";
  EXPECT_EQ(of(), hopper);
  EXPECT_EQ(of([](AttentionProblem& p) { p.head_size = 104; }), hopper);
  EXPECT_EQ(of([](AttentionProblem& p) { p.causal = true; }), hopper);
  EXPECT_EQ(of([](AttentionProblem& p) { p.num_key_segments = 2; }), hopper);  // no keys in the second
  EXPECT_EQ(of([](AttentionProblem& p) {  // distances between single elements are never used
              p.batch = 1;
              p.queries[0].strides.batch = 3;
            }),
            hopper);
}

TEST_F(FlashKernelName, OfTheKernelForOtherGpus) {
  if (kernels::cuda::flash_kernels_built() == "plain") GTEST_SKIP() << "skipped: no architecture from 8.0 on";
  const std::string other = "flash_sm80, blocks of 64 keys, for ";
  EXPECT_EQ(of([](AttentionProblem&) {}, 80), other + "a GPU of another compute capability than 9.0");
  EXPECT_EQ(of([](AttentionProblem&) {}, 120), other + "a GPU of another compute capability than 9.0");
  EXPECT_EQ(of([](AttentionProblem&) {}, 90, 80), other + "a GPU of another compute capability than 9.0");
  const std::vector<std::function<void(AttentionProblem&)>> unmapped{
      [](AttentionProblem& p) { p.key_segments[0].key_strides.batch = 0; },
      [](AttentionProblem& p) { p.key_segments[0].value_strides.token *= -1; },
      [](AttentionProblem& p) { p.key_segments[0].value_strides.head = std::int64_t{1} << 40; }};
  for (const auto& change : unmapped)
    EXPECT_EQ(of(change), other + "strides that are not positive, or from 2^40 bytes on");
}

TEST_F(FlashKernelName, OfThePlainKernelWithTheReason) {
  EXPECT_EQ(of([](AttentionProblem&) {}, 75), "sdpa_native, for a GPU of a compute capability below 8.0");
  EXPECT_EQ(of([](AttentionProblem& p) { p.type = ElementType::float32; }), "sdpa_native, for float32");
  EXPECT_EQ(of([](AttentionProblem& p) { p.head_size = 257; }), "sdpa_native, for a head size above 256");
  EXPECT_EQ(of([](AttentionProblem& p) { p.rows = std::int64_t{1} << 31; }),
            "sdpa_native, for 2^31 rows, keys or heads");
  for (const float scale : {0.F, -2.5F, 1e-21F}) {
    EXPECT_EQ(of([&](AttentionProblem& p) { p.scale = scale; }), "sdpa_native, for a scale of 1e-20 or less");
  }
  const std::vector<std::function<void(AttentionProblem&)>> unaligned{
      [](AttentionProblem& p) { p.queries[0].data = static_cast<const char*>(p.queries[0].data) + 2; },
      [](AttentionProblem& p) { p.key_segments[0].key = static_cast<const char*>(p.key_segments[0].key) + 8; },
      [](AttentionProblem& p) { p.queries[0].strides.token += 1; },
      [](AttentionProblem& p) { p.out_strides.token += 1; }, [](AttentionProblem& p) { p.head_size = 97; }};
  for (const auto& change : unaligned) {
    EXPECT_EQ(of(change), "sdpa_native, for a head size, starts or strides that are not multiples of 16 bytes");
  }
}

class CudaFlash : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_info().devices.empty()) GTEST_SKIP() << "skipped: no CUDA device (" << cuda_info().reason << ")";
  }
};

// FLASH_ATTN's output and that of TORCH_SDPA's native kernel, which knows maxima first; one head of size 64, on the
// host.
std::array<Tensor, 2> both_outputs(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const AttentionMetadata& metadata) {
  std::array<Tensor, 2> outs;
  for (std::size_t i = 0; i < 2; ++i) {
    const Enum member = i == 0 ? Enum::FLASH_ATTN : Enum::TORCH_SDPA;
    ImplConfig config{.num_heads = 1, .head_size = 64};
    if (i == 1) config.backend_kwargs = {{"engine", "native"}};
    const auto attention = member.get_class()->make(config);
    outs[i] =
        copy_to(attention->forward(copy_to(query, kGpu), copy_to(key, kGpu), copy_to(value, kGpu), metadata), kCpu);
  }
  return outs;
}

// A reference is found in the first 128 keys; by more than float32 holds, keys 128 and 129 are above it.
TEST_F(CudaFlash, LogitsMayRiseByMoreThanFloat32Holds) {
  for (const std::int64_t high_keys : {1, 2}) {
    for (const double above : {3.0, 3.328125, 60.0}) {
      const Tensor query = empty(std::array<std::int64_t, 4>{1, 64, 1, 64}, kFloat16);
      const Tensor key = empty(std::array<std::int64_t, 4>{1, 256, 1, 64}, kFloat16);
      for (std::int64_t i = 0; i < query.numel(); ++i) store_element(query.data_ptr(), i, kFloat16, 3.3125);
      for (std::int64_t i = 0; i < key.numel(); ++i) {
        const bool high = i / 64 >= 128 && i / 64 < 128 + high_keys;
        store_element(key.data_ptr(), i, kFloat16, high ? above : 0);
      }
      const auto [out, expected] = both_outputs(query, key, random_tensor({1, 256, 1, 64}, kFloat16, 1), {});
      const double error = relative_error(out, expected);
      EXPECT_LT(error, 1e-3) << high_keys << " keys of " << above;
    }
  }
}

// What stands for "hidden" in many models hides nothing where all keys have it.
TEST_F(CudaFlash, RowsMayBeBiasedAsAWhole) {
  for (const double bias : {-1e4, -1e9, -1e10, -3.4028234e38}) {
    const Tensor mask = empty(std::array<std::int64_t, 4>{1, 1, 100, 300}, kFloat32);
    for (std::int64_t i = 0; i < mask.numel(); ++i) {
      store_element(mask.data_ptr(), i, kFloat32, i / 300 % 2 == 0 ? bias : 0);
    }
    const AttentionMetadata metadata({.attn_mask = copy_to(mask, kGpu)});
    const auto [out, expected] =
        both_outputs(random_tensor({1, 100, 1, 64}, kFloat16, 1), random_tensor({1, 300, 1, 64}, kFloat16, 2),
                     random_tensor({1, 300, 1, 64}, kFloat16, 3), metadata);
    const double error = relative_error(out, expected);
    EXPECT_LT(error, 2e-3) << bias;
  }
}

struct Size {
  std::int64_t tokens;
  std::int64_t heads;
};

// How a (2, tokens, heads, 64) tensor lies in a buffer.
struct Layout {
  const char* name;
  std::function<std::int64_t(const Size&)> start;
  std::function<std::array<std::int64_t, 3>(const Size&)> strides;
};

Tensor view(const Tensor& buffer, const Layout& layout, const Size& size) {
  const auto [batch, token, head] = layout.strides(size);
  return wrap(static_cast<char*>(buffer.data_ptr()) + 2 * layout.start(size), {2, size.tokens, size.heads, 64},
              kFloat16, {batch, token, head, 1}, buffer.device());
}

TEST_F(CudaFlash, TensorsLieAnyhow) {
  const auto at_start = [](const Size&) { return std::int64_t{0}; };
  const auto contiguous = [](const Size& s) { return std::array{s.tokens * s.heads * 64, s.heads * 64, 64L}; };
  const std::vector<Layout> layouts{{"contiguous", at_start, contiguous},
                                    {"two bytes off", [](const Size&) { return std::int64_t{1}; }, contiguous},
                                    {"eight bytes off", [](const Size&) { return std::int64_t{4}; }, contiguous},
                                    {"odd distances", at_start,
                                     [](const Size& s) {
                                       return std::array{s.tokens * s.heads * 67, s.heads * 67, 67L};
                                     }},
                                    {"gaps", at_start,
                                     [](const Size& s) {
                                       return std::array{s.tokens * s.heads * 72 + 8, s.heads * 72, 72L};
                                     }},
                                    {"heads first", at_start,
                                     [](const Size& s) {
                                       return std::array{s.tokens * s.heads * 64, 64L, s.tokens * 64};
                                     }},
                                    {"backwards", [](const Size& s) { return (s.tokens - 1) * s.heads * 64; },
                                     [](const Size& s) {
                                       return std::array{s.tokens * s.heads * 64, -s.heads * 64, 64L};
                                     }},
                                    {"one batch entry", at_start, [](const Size& s) {
                                       return std::array{0L, s.heads * 64, 64L};
                                     }}};
  const ImplConfig config{.num_heads = 4, .head_size = 64, .num_kv_heads = 2};
  const Size rows{130, 4};
  const Size keys{300, 2};
  const Tensor query = random_tensor({2 * 130 * 4 * 72 + 16}, kFloat16, 1);
  const Tensor key = random_tensor({2 * 300 * 2 * 72 + 16}, kFloat16, 2);
  const Tensor value = random_tensor({2 * 300 * 2 * 72 + 16}, kFloat16, 3);
  const Tensor zeros = empty({2 * 130 * 4 * 72 + 16}, kFloat16);
  std::memset(zeros.data_ptr(), 0, static_cast<std::size_t>(2 * zeros.numel()));
  const auto run = [&](const Enum& member, DLDevice device, const Layout& in, const Layout& out) {
    const Tensor q = copy_to(query, device);
    const Tensor k = copy_to(key, device);
    const Tensor v = copy_to(value, device);
    Tensor result = copy_to(zeros, device);
    member.get_class()->make(config)->forward(view(q, in, rows), view(k, in, keys), view(v, in, keys), {},
                                              {.out = view(result, out, rows)});
    return copy_to(result, kCpu);
  };
  for (const Layout& layout : layouts) {
    const Layout& of_out = &layout == &layouts.back() ? layouts.front() : layout;  // no batch of one there
    for (const auto& [in, out] : {std::pair{&layout, &layouts.front()}, std::pair{&layouts.front(), &of_out}}) {
      EXPECT_LT(relative_error(run(Enum::FLASH_ATTN, kGpu, *in, *out), run(Enum::TORCH_SDPA, kCpu, *in, *out)), 1e-3)
          << in->name << " to " << out->name;
    }
  }
}

// Batch entry `entry` of a contiguous tensor, in place.
Tensor entry_of(const Tensor& tensor, std::int64_t entry) {
  const std::int64_t bytes = tensor.stride(0) * tensor.dtype().bits / 8;
  return wrap(static_cast<char*>(tensor.data_ptr()) + entry * bytes,
              {1, tensor.size(1), tensor.size(2), tensor.size(3)}, tensor.dtype(),
              {tensor.stride(0), tensor.stride(1), tensor.stride(2), 1}, tensor.device());
}

// Head size, dtype, causal.
class CudaFlashBits : public ::testing::TestWithParam<std::tuple<std::int64_t, DLDataType, bool>> {
 protected:
  static constexpr std::int64_t kRows = 333;
  static constexpr std::int64_t kKeys = 517;

  struct Result {
    Tensor out;
    Tensor lse;
  };
  static bool same(const Result& a, const Result& b) { return same_bytes(a.out, b.out) && same_bytes(a.lse, b.lse); }
};

TEST_P(CudaFlashBits, DependOnNeitherTheRunNorTheBatch) {
  if (cuda_info().devices.empty()) GTEST_SKIP() << "skipped: no CUDA device (" << cuda_info().reason << ")";
  const auto [size, dtype, causal] = GetParam();
  const auto attention =
      Enum::FLASH_ATTN.get_class()->make({.num_heads = 4, .head_size = size, .causal = causal, .num_kv_heads = 2});
  const auto run = [&](const Tensor& q, const Tensor& k, const Tensor& v) {
    Result result{.out = {}, .lse = empty(std::array{q.size(0), std::int64_t{4}, kRows}, kFloat32, kGpu)};
    result.out = attention->forward(q, k, v, {}, {.lse = result.lse});
    return result;
  };
  for (const std::int64_t batch : {10, 12}) {  // on 132 multiprocessors in tiles of 128 and 192 rows, alone of 64
    const Tensor query = copy_to(random_tensor({batch, kRows, 4, size}, dtype, 1), kGpu);
    const Tensor key = copy_to(random_tensor({batch, kKeys, 2, size}, dtype, 2), kGpu);
    const Tensor value = copy_to(random_tensor({batch, kKeys, 2, size}, dtype, 3), kGpu);
    const Result whole = run(query, key, value);
    for (int i = 0; i < 10; ++i) ASSERT_TRUE(same(run(query, key, value), whole)) << "run " << i;
    for (std::int64_t entry = 0; entry < batch; ++entry) {
      const Result alone = run(entry_of(query, entry), entry_of(key, entry), entry_of(value, entry));
      auto* lse = static_cast<float*>(whole.lse.data_ptr()) + entry * 4 * kRows;
      const Result part{.out = entry_of(whole.out, entry),
                        .lse = wrap(lse, {1, 4, kRows}, kFloat32, {4 * kRows, kRows, 1}, kGpu)};
      EXPECT_TRUE(same(alone, part)) << "batch entry " << entry << " of " << batch;
    }
  }
}

std::string case_name(const ::testing::TestParamInfo<CudaFlashBits::ParamType>& test) {
  const auto [size, dtype, causal] = test.param;
  return fmt::format("{}_{}{}", size, dtype_name(dtype), causal ? "_causal" : "");
}

INSTANTIATE_TEST_SUITE_P(, CudaFlashBits,
                         ::testing::Combine(::testing::Values(40, 64, 72, 96, 128, 192, 256),
                                            ::testing::Values(kFloat16, kBFloat16), ::testing::Bool()),
                         case_name);

}  // namespace
}  // namespace ditattn
