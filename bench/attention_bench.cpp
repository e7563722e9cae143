// CPU back ends side by side on shapes of real models, in (B, S, H, D) memory as models have it:
// SHAPE/VARIANT/DTYPE/MEMBER. The counter is GFLOP/s = 4·B·H·Sq·Skv·D / time, of what the variant lets rows see.

#include <benchmark/benchmark.h>
#include <ditattn/ditattn.hpp>
#include <fmt/format.h>

#include <random>

#include "bench/variants.hpp"

namespace ditattn {
namespace {

using bench::Variant;

struct Shape {
  const char* name;
  std::int64_t batch, heads, seq_q, seq_kv, head_size;
  bool variants;
};

constexpr Shape kShapes[] = {
#define DITATTN_BENCH_SHAPE(...) {__VA_ARGS__},
#include "bench/shapes.def"
#undef DITATTN_BENCH_SHAPE
};

Tensor random_tensor(std::initializer_list<std::int64_t> shape, DLDataType dtype, std::uint64_t seed) {
  Tensor tensor = empty(shape, dtype);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, dtype, normal(generator));
  return tensor;
}

// Pairs of a row and a key it sees, per head; causal shapes are square.
double visible_pairs(const Shape& s, const Variant& variant) {
  const auto rows = static_cast<double>(s.seq_q);
  return variant.causal ? rows * (rows + 1) / 2 : rows * static_cast<double>(visible_keys(variant, s.seq_kv));
}

void attention(benchmark::State& state, DiffusionAttentionBackendEnum member, const Shape& s, const Variant& variant,
               DLDataType dtype) {
  const auto impl =
      member.get_class()->make({.num_heads = s.heads, .head_size = s.head_size, .causal = variant.causal});
  const Tensor query = random_tensor({s.batch, s.seq_q, s.heads, s.head_size}, dtype, 1);
  const Tensor key = random_tensor({s.batch, s.seq_kv, s.heads, s.head_size}, dtype, 2);
  const Tensor value = random_tensor({s.batch, s.seq_kv, s.heads, s.head_size}, dtype, 3);
  const Tensor out = empty({s.batch, s.seq_q, s.heads, s.head_size}, dtype);
  const AttentionMetadata metadata = metadata_of(variant, s.batch, s.seq_kv);
  for (auto _ : state) impl->forward(query, key, value, metadata, {.out = out});
  const double flops = 4.0 * static_cast<double>(s.batch * s.heads * s.head_size) * visible_pairs(s, variant);
  state.counters["GFLOP/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void register_benchmark(DiffusionAttentionBackendEnum member, const Shape& shape, const Variant& variant,
                        DLDataType dtype) {
  const Problem problem{.batch = shape.batch,
                        .num_heads = shape.heads,
                        .num_kv_heads = shape.heads,
                        .seq_q = shape.seq_q,
                        .seq_kv = shape.seq_kv,
                        .head_size = shape.head_size,
                        .dtype = dtype};
  if (!can_run(member, variant, problem)) return;
  const std::string name = fmt::format("{}/{}/{}/{}", shape.name, variant.name, dtype_name(dtype), member.name());
  benchmark::RegisterBenchmark(
      name.c_str(), [=, &shape, &variant](benchmark::State& state) { attention(state, member, shape, variant, dtype); })
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

// Registered by hand: the back ends are those this machine has.
const bool kRegistered = [] {
  for (const Shape& shape : kShapes) {
    for (const Variant& variant : bench::kVariants) {
      if (!shape.variants && &variant != bench::kVariants) continue;
      for (const DLDataType dtype : {kFloat32, kBFloat16, kFloat16}) {
        for (const auto member : DiffusionAttentionBackendEnum::members()) {
          register_benchmark(member, shape, variant, dtype);
        }
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace ditattn
