// Rows of calls on a GPU, copied to the host, give what the same rows on the host give; and a guard over FLASH_ATTN
// finds what is overwritten in its output, replaces it, and leaves graphs alone.

#include <cuda_runtime.h>
#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>

#include "core/row_reference.hpp"
#include "tests/conformance/inputs.hpp"
#include "tests/conformance/random_problem.hpp"
#include "tests/cuda/gpu_testing.hpp"

namespace ditattn {
namespace {

using testing::InStream;
using testing::kGpu;
using testing::must;
using testing::random_tensor;
using testing::relative_error;
using Enum = DiffusionAttentionBackendEnum;

// FLASH_ATTN, whose output is then overwritten in this thread's stream.
class Corrupted final : public AttentionBackend {
 public:
  using Overwrite = std::function<void(const Tensor& out, cudaStream_t stream)>;

  explicit Corrupted(Overwrite overwrite)
      : flash_(Enum::FLASH_ATTN.get_class()), overwrite_(std::move(overwrite)), can_(flash_->capabilities()) {}
  [[nodiscard]] std::string get_name() const override { return "CORRUPTED"; }
  [[nodiscard]] const Capabilities& capabilities() const override { return can_; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<Impl>(config, *this);
  }

 private:
  class Impl final : public AttentionImpl {
   public:
    Impl(const ImplConfig& config, const Corrupted& corrupted)
        : AttentionImpl(config), corrupted_(corrupted), flash_(corrupted.flash_->make(config)) {}
    void run(const AttentionCall& call) const override {
      flash_->run(call);
      corrupted_.overwrite_(call.out, static_cast<cudaStream_t>(current_stream(kGpu)));
    }

   private:
    const Corrupted& corrupted_;
    std::unique_ptr<AttentionImpl> flash_;
  };

  BackendClass flash_;
  Overwrite overwrite_;
  Capabilities can_;
};

// All bits of one element: NaN.
Corrupted::Overwrite nan_at(std::int64_t element) {
  return [element](const Tensor& out, cudaStream_t stream) {
    must(cudaMemsetAsync(static_cast<char*>(data_pointer(out)) + 2 * element, 0xFF, 2, stream));
  };
}

// The last token of all heads: zero.
void clear_last_token(const Tensor& out, cudaStream_t stream) {
  const std::int64_t bytes = 2 * out.size(2) * out.size(3);
  must(cudaMemsetAsync(static_cast<char*>(data_pointer(out)) + (out.size(1) - 1) * bytes, 0,
                       static_cast<std::size_t>(bytes), stream));
}

class CudaGuard : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_info().devices.empty()) GTEST_SKIP() << "skipped: no CUDA device (" << cuda_info().reason << ")";
    for (const auto& [tensor, seed] : {std::pair(&query_, 1), std::pair(&key_, 2), std::pair(&value_, 3)}) {
      *tensor = copy_to(random_tensor({1, 300, 4, 64}, kFloat16, static_cast<std::uint64_t>(seed)), kGpu);
    }
    out_ = empty(std::array<std::int64_t, 4>{1, 300, 4, 64}, kFloat16, kGpu);
  }
  static ImplConfig config() { return {.num_heads = 4, .head_size = 64, .prefix = "blocks.0", .role = "self"}; }
  Tensor call(const AttentionImpl& layer) const { return layer.forward(query_, key_, value_, {}, {.out = out_}); }
  static GuardedLayer only(const Guard& guard) {
    const GuardReport report = guard.report();
    EXPECT_EQ(report.layers.size(), 1U);
    return report.layers.empty() ? GuardedLayer() : report.layers.front();
  }

  Tensor query_, key_, value_, out_;
};

void expect_same_errors(const RowErrors& got, const RowErrors& expected) {
  EXPECT_EQ(got.rel_l2, expected.rel_l2);
  EXPECT_EQ(got.rel_l2_abs, expected.rel_l2_abs);
  EXPECT_EQ(got.max_abs, expected.max_abs);
  EXPECT_EQ(got.worst_row, expected.worst_row);
  EXPECT_EQ(got.logit_size, expected.logit_size);
  EXPECT_EQ(got.wrong_non_finite, expected.wrong_non_finite);
  EXPECT_EQ(got.nonzero_without_keys, expected.nonzero_without_keys);
}

// Query stands for the output: any numbers will do.
RowErrors errors_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                    const AttentionMetadata& metadata, bool causal, const std::vector<Row>& rows) {
  const Tensor lse;
  return check_rows({query, key, value, out, lse, metadata}, 0.3, causal, CausalAlignment::bottom_right, rows);
}

TEST_F(CudaGuard, RowsOnTheGpuAreThoseOnTheHost) {
  const InStream stream;
  Capabilities can;
  can.dtypes = {kFloat32, kFloat16, kBFloat16};
  for (std::uint64_t seed = 900; seed < 1000 && !HasFailure(); ++seed) {
    const conformance::Drawn drawn = conformance::draw_problem(seed, can);
    SCOPED_TRACE(drawn.text);
    const Problem problem{.batch = drawn.query.size(0), .num_heads = drawn.query.size(2), .seq_q = drawn.rows};
    const std::vector<Row> rows = sample_rows(problem, 16, seed);
    const Tensor out =
        random_tensor({problem.batch, drawn.rows, problem.num_heads, drawn.query.size(3)}, drawn.query.dtype(), seed);
    const RowErrors expected =
        errors_of(drawn.query, drawn.key, drawn.value, out, drawn.metadata, drawn.config.causal, rows);
    const RowErrors got = errors_of(copy_to(drawn.query, kGpu), copy_to(drawn.key, kGpu), copy_to(drawn.value, kGpu),
                                    copy_to(out, kGpu), copy_to(drawn.metadata, kGpu), drawn.config.causal, rows);
    expect_same_errors(got, expected);
  }
}

TEST_F(CudaGuard, RowsOfAnyStridesAreThoseOnTheHost) {
  const InStream stream;
  std::uint64_t seed = 1;
  for (const conformance::Case& c : conformance::load_cases("pairwise")) {
    if (HasFailure()) break;
    SCOPED_TRACE(c.line);
    const conformance::Inputs host = conformance::make_inputs(c, CausalAlignment::bottom_right, ++seed);
    const conformance::Inputs gpu = conformance::copy_to(host, kGpu);
    const std::vector<Row> rows = sample_rows({.batch = c.batch, .num_heads = c.heads, .seq_q = c.seq_q}, 12, seed);
    expect_same_errors(errors_of(gpu.query, gpu.key, gpu.value, gpu.query, gpu.metadata, c.causal, rows),
                       errors_of(host.query, host.key, host.value, host.query, host.metadata, c.causal, rows));
  }
}

TEST_F(CudaGuard, RightNumbersAreNotReported) {
  const InStream stream;
  const Guard guard({.every = 1});
  const auto layer = Enum::FLASH_ATTN.get_class()->make(config());
  for (int i = 0; i < 4; ++i) call(*layer);
  EXPECT_EQ(only(guard).checks, 4U);
  EXPECT_EQ(only(guard).failures, 0U) << guard.report().text();
  fmt::print("FLASH_ATTN: {:.1e} of {:.1e}\n", only(guard).worst.error, only(guard).worst.bound);
}

TEST_F(CudaGuard, OneOverwrittenElementIsFound) {
  const InStream stream;
  for (const std::int64_t element : {0, 76'799, 12'345, 40'000}) {
    const Guard guard({.rows = 2});
    call(*std::make_shared<Corrupted>(nan_at(element))->make(config()));
    const GuardedLayer seen = only(guard);
    EXPECT_EQ(seen.backend, "CORRUPTED");
    EXPECT_EQ(seen.non_finite, 1U);
    EXPECT_EQ(seen.worst.query, element / 256);
    EXPECT_EQ(seen.worst.head, element / 64 % 4);
  }
}

TEST_F(CudaGuard, AClearedLastTokenIsFound) {
  const InStream stream;
  const Guard guard;
  call(*std::make_shared<Corrupted>(clear_last_token)->make(config()));
  EXPECT_EQ(only(guard).failures, 1U);
  EXPECT_EQ(only(guard).worst.query, 299);
  EXPECT_GT(only(guard).worst.error, 0.5);
}

TEST_F(CudaGuard, ReplacedCallsAreRight) {
  const InStream stream;
  const Tensor expected = copy_to(Enum::FLASH_ATTN.get_class()->make(config())->forward(query_, key_, value_), kCpu);
  const auto layer = std::make_shared<Corrupted>(clear_last_token)->make(config());
  const Guard guard({.on_failure = GuardAction::replace});
  for (int i = 0; i < 3; ++i) EXPECT_LT(relative_error(copy_to(call(*layer), kCpu), expected), 1e-3);
  EXPECT_EQ(only(guard).replaced_by, Enum::FLASH_ATTN.get_class()->get_name());
  EXPECT_EQ(only(guard).failures, 1U);
}

TEST_F(CudaGuard, CapturedCallsAreLeftAlone) {
  const InStream stream;
  const auto layer = Enum::FLASH_ATTN.get_class()->make(config());
  call(*layer);  // what is built at a first call is there
  synchronize(kGpu);
  const Guard guard({.every = 1});
  cudaGraph_t graph = nullptr;
  must(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  call(*layer);
  must(cudaStreamEndCapture(stream.get(), &graph));
  must(cudaGraphDestroy(graph));
  EXPECT_EQ(only(guard).captured, 1U);
  EXPECT_EQ(only(guard).checks, 0U);
  call(*layer);
  EXPECT_EQ(only(guard).checks, 1U);
  EXPECT_EQ(only(guard).failures, 0U);
}

// 16 heads of 16,384 keys: what a check costs.
TEST_F(CudaGuard, TimeOfACheck) {
  const InStream stream;
  const Tensor query = copy_to(random_tensor({1, 16'384, 16, 128}, kBFloat16, 5), kGpu);
  const auto layer = Enum::FLASH_ATTN.get_class()->make({.num_heads = 16, .head_size = 128, .prefix = "large"});
  for (const bool scan : {false, true}) {
    layer->forward(query, query, query);
    synchronize(kGpu);
    const Guard guard({.every = 1, .scan = scan});
    const auto start = std::chrono::steady_clock::now();
    layer->forward(query, query, query);
    const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
    EXPECT_EQ(only(guard).failures, 0U) << guard.report().text();
    fmt::print("a call of 16,384 tokens, 16 heads of 128, with its check: {:.1f} ms{}\n", elapsed.count(),
               scan ? ", scan included" : "");
  }
}

}  // namespace
}  // namespace ditattn
