// CPU back ends side by side on shapes of real models, in (B, S, H, D) memory as models have it. The counter is
// GFLOP/s = 4·B·H·Sq·Skv·D / time (half when causal).

#include <benchmark/benchmark.h>
#include <ditattn/ditattn.hpp>
#include <fmt/format.h>

#include <random>

namespace ditattn {
namespace {

struct Shape {
  const char* name;
  std::int64_t batch, heads, seq_q, seq_kv, head_size;
  bool causal = false;
};

constexpr Shape kShapes[] = {
    {"dit-xl/2-512", 2, 16, 1024, 1024, 72},    {"sd3-1024-tokens", 2, 24, 1024, 1024, 64},
    {"sit-xl/2-256", 8, 16, 256, 256, 72},      {"cross-512-keys", 1, 40, 2048, 512, 128},
    {"flux-2k-tokens", 1, 12, 2048, 2048, 128}, {"causal-2k", 1, 12, 2048, 2048, 128, true},
};

Tensor random_tensor(std::initializer_list<std::int64_t> shape, DLDataType dtype, std::uint64_t seed) {
  Tensor tensor = empty(shape, dtype);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, dtype, normal(generator));
  return tensor;
}

void attention(benchmark::State& state, DiffusionAttentionBackendEnum member, const Shape& s, DLDataType dtype) {
  const auto impl = member.get_class()->make({.num_heads = s.heads, .head_size = s.head_size, .causal = s.causal});
  const Tensor query = random_tensor({s.batch, s.seq_q, s.heads, s.head_size}, dtype, 1);
  const Tensor key = random_tensor({s.batch, s.seq_kv, s.heads, s.head_size}, dtype, 2);
  const Tensor value = random_tensor({s.batch, s.seq_kv, s.heads, s.head_size}, dtype, 3);
  const Tensor out = empty({s.batch, s.seq_q, s.heads, s.head_size}, dtype);
  for (auto _ : state) impl->forward(query, key, value, {}, {.out = out});
  const double flops =
      (s.causal ? 2.0 : 4.0) * static_cast<double>(s.batch * s.heads * s.seq_q * s.seq_kv * s.head_size);
  state.counters["GFLOP/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

// Registered by hand: the back ends are those this machine has.
const bool kRegistered = [] {
  for (const Shape& shape : kShapes) {
    for (const DLDataType dtype : {kFloat32, kBFloat16}) {
      for (const auto member : DiffusionAttentionBackendEnum::members()) {
        try {
          member.get_class()->validate_available();
        } catch (const Error&) {
          continue;
        }
        const std::string name = fmt::format("{}/{}/{}", shape.name, dtype_name(dtype), member.name());
        benchmark::RegisterBenchmark(name.c_str(),
                                     [=, &shape](benchmark::State& state) { attention(state, member, shape, dtype); })
            ->UseRealTime()
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace ditattn
