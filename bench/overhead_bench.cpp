// What the library costs beside the kernels: look-ups, and a forward on the smallest problem. Targets: a look-up of a
// loaded class under 100 ns; `forward` under 1 µs more than the kernel alone.

#include <benchmark/benchmark.h>
#include <ditattn/ditattn.hpp>

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

}  // namespace
}  // namespace ditattn
