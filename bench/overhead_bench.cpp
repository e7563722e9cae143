// What the library costs beside the kernels: look-ups, and a forward on the smallest problem. Targets: a look-up of a
// loaded class under 100 ns; `forward` under 1 µs more than the kernel alone; a default's choice among measured
// problems under 200 ns.

#include <benchmark/benchmark.h>
#include <ditattn/ditattn.hpp>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cpu/flash_attention.hpp"

namespace ditattn {
namespace {

void get_class(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(DiffusionAttentionBackendEnum::FLASH_ATTN.get_class());
}
BENCHMARK(get_class);

void from_name_and_get_class(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(DiffusionAttentionBackendEnum::from_name("FLASH_ATTN").get_class());
}
BENCHMARK(from_name_and_get_class);

float tiny[8] = {1, 2, 3, 4, 5, 6, 7, 8};

void flash_kernel_1_1_1_1_8(benchmark::State& state) {
  using namespace kernels::cpu;
  float out[8];
  const Strides strides{.batch = 8, .token = 8, .head = 8};
  AttentionProblem problem;
  problem.batch = problem.heads = problem.kv_heads = problem.rows = problem.keys = 1;
  problem.head_size = 8;
  problem.num_queries = problem.num_key_segments = 1;
  problem.queries[0] = {.data = tiny, .strides = strides};
  problem.key_segments[0] = {
      .key = tiny, .value = tiny, .key_strides = strides, .value_strides = strides, .keys = 1, .mask = {}};
  problem.out = out;
  problem.out_strides = strides;
  const Executor executor{.threads = num_threads(), .parallel_for = &parallel_for};
  const CpuUnits units{.level = detect_cpu_level()};
  for (auto _ : state) {
    flash_attention(problem, executor, units);
    benchmark::DoNotOptimize(out);
  }
}
BENCHMARK(flash_kernel_1_1_1_1_8);

void flash_forward_1_1_1_1_8(benchmark::State& state) {
  const auto impl = DiffusionAttentionBackendEnum::FLASH_ATTN.get_class()->make({.num_heads = 1, .head_size = 8});
  const Tensor tensor = wrap(tiny, {1, 1, 1, 8}, kFloat32);
  for (auto _ : state) benchmark::DoNotOptimize(impl->forward(tensor, tensor, tensor));
}
BENCHMARK(flash_forward_1_1_1_1_8);

void attention_layer_that_is_kept(benchmark::State& state) {
  const AttentionOptions options{.backend = state.range(0) == 0 ? "auto" : "FLASH_ATTN"};
  for (auto _ : state) benchmark::DoNotOptimize(attention_layer(options, {.head_size = 8}));
}
BENCHMARK(attention_layer_that_is_kept)->Arg(0)->Arg(1);

void attention_1_1_1_1_8(benchmark::State& state) {
  const Tensor tensor = wrap(tiny, {1, 1, 1, 8}, kFloat32);
  for (auto _ : state) benchmark::DoNotOptimize(attention(tensor, tensor, tensor, {.backend = "FLASH_ATTN"}));
}
BENCHMARK(attention_1_1_1_1_8);

// --- Choice by measurement, with a backend that takes no time: of one key, attention is V.

class OneKey final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "ONE_KEY"; }
  [[nodiscard]] const Capabilities& capabilities() const override { return can_; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    class Impl final : public AttentionImpl {
     public:
      using AttentionImpl::AttentionImpl;
      void run(const AttentionCall& call) const override {
        const auto bytes = static_cast<std::size_t>(call.value.numel()) * sizeof(float);
        for (std::int64_t i = 0; i < call.query.size(1); ++i) {
          std::memcpy(static_cast<char*>(call.out.data_ptr()) + static_cast<std::size_t>(i) * bytes,
                      call.value.data_ptr(), bytes);
        }
      }
    };
    return std::make_unique<Impl>(config);
  }

 private:
  Capabilities can_{.engine = "memcpy", .devices = {"cpu"}, .dtypes = {kFloat32}, .head_sizes = {}, .masks = {}};
};

// 500 problems that were measured, in this process alone.
const std::vector<Problem>& measured_problems() {
  static const std::vector<Problem> problems = [] {
    ::setenv("DITATTN_TUNE", "use", 1);
    ::setenv("DITATTN_TUNE_CACHE", "/nowhere", 1);  // not the user's
    reload_tuned();
    register_diffusion_backend<OneKey>(DiffusionAttentionBackendEnum::CUSTOM);
    std::vector<Problem> made;
    for (std::int64_t i = 0; i < 500; ++i) {
      made.push_back({.seq_q = i + 1, .head_size = 8});
      tune(made.back(), {.members = {DiffusionAttentionBackendEnum::CUSTOM}, .budget_ms = 0, .publish = false});
    }
    return made;
  }();
  return problems;
}

// What a layer that names nobody asks at each call.
void default_choice(benchmark::State& state) {
  const std::vector<Problem>& problems = measured_problems();
  const BackendClass backend = get_attn_backend_for_role("self", 8).backend;
  const auto count = static_cast<std::size_t>(state.range(0));
  std::size_t i = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(backend->explain(problems[i]));
    if (++i == count) i = 0;
  }
}
BENCHMARK(default_choice)->ArgName("problems")->Arg(1)->Arg(2)->Arg(500);

void tuned_of_500(benchmark::State& state) {
  const std::vector<Problem>& problems = measured_problems();
  std::size_t i = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(tuned(problems[i]));
    if (++i == problems.size()) i = 0;
  }
}
BENCHMARK(tuned_of_500);

void one_key_forward(benchmark::State& state, bool is_named) {
  measured_problems();
  const BackendClass backend =
      is_named ? DiffusionAttentionBackendEnum::CUSTOM.get_class() : get_attn_backend_for_role("self", 8).backend;
  const auto impl = backend->make({.num_heads = 1, .head_size = 8});
  const Tensor tensor = wrap(tiny, {1, 1, 1, 8}, kFloat32);
  for (auto _ : state) benchmark::DoNotOptimize(impl->forward(tensor, tensor, tensor));
}
BENCHMARK_CAPTURE(one_key_forward, by_name, true);
BENCHMARK_CAPTURE(one_key_forward, by_default, false);

}  // namespace
}  // namespace ditattn
