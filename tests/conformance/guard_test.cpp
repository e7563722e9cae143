// The guard raises no false alarm: exact back ends stay below its bounds over every case and random metadata, outliers,
// offsets, huge and tiny numbers and masked rows among them. Quantized ones do not, but below an error of their own.

#include <ditattn/guard.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/conformance/options.hpp"
#include "tests/conformance/random_problem.hpp"

namespace ditattn::conformance {
namespace {

// What a back end refuses is not computed, and so not checked.
void forward(const BackendClass& backend, ImplConfig config, const Tensor& query, const Tensor& key,
             const Tensor& value, const AttentionMetadata& metadata, const std::string& name) {
  const DLDevice device = options().device;
  config.prefix = name;
  try {
    backend->make(config)->forward(ditattn::copy_to(query, device), ditattn::copy_to(key, device),
                                   ditattn::copy_to(value, device), ditattn::copy_to(metadata, device));
  } catch (const ValueError&) {
    return;
  }
}

void forward_cases(const BackendClass& backend, const char* file) {
  for (Case& c : load_cases(file)) {
    if (backend->capabilities().masked_nan_propagates) c.nan = NanCase::none;  // the alarm would be true
    if (!backend->explain(problem_of(c))) continue;
    const Inputs inputs = make_inputs(c, backend->capabilities().causal_alignment, options().seed);
    forward(backend,
            {.num_heads = c.heads,
             .head_size = c.head_size,
             .softmax_scale = c.scale,
             .causal = c.causal,
             .num_kv_heads = c.kv_heads},
            inputs.query, inputs.key, inputs.value, inputs.metadata, c.line);
  }
}

void forward_random_metadata(const BackendClass& backend) {
  for (std::uint64_t seed = 60'000; seed < 60'200; ++seed) {
    const Drawn drawn = draw_problem(seed, backend->capabilities());
    forward(backend, drawn.config, drawn.query, drawn.key, drawn.value, drawn.metadata, drawn.text);
  }
}

// Many keys, from which a row takes few or all: sums are long, and cancel. K may have an offset.
void forward_long(const BackendClass& backend, double query_scale, double offset) {
  for (const DLDataType dtype : {kFloat32, kFloat16, kBFloat16}) {
    std::mt19937_64 generator(options().seed);
    const auto tensor = [&](std::int64_t tokens, double scale, double mean) {
      Tensor made = empty({1, tokens, 2, 64}, dtype);
      std::normal_distribution<double> normal(mean, scale);
      for (std::int64_t i = 0; i < made.numel(); ++i) store_element(made.data_ptr(), i, dtype, normal(generator));
      return made;
    };
    const Tensor query = tensor(64, query_scale, 0);
    const Tensor key = tensor(16'384, 1, offset);
    forward(backend, {.num_heads = 2, .head_size = 64}, query, key, tensor(16'384, 1, 0), AttentionMetadata(nullptr),
            fmt::format("16,384 keys, Q times {}, K plus {}", query_scale, offset));
  }
}

TEST(Guard, ExactBackEndsRaiseNoFalseAlarm) {
  for (const NamedBackend& named : chosen_backends()) {
    const Quantization quantized = quantization(named, options().device);
    if (quantized.bytes != 0 || quantized.in_e4m3 || quantized.in_e2m1) continue;
    const Guard guard({.every = 1, .rows = 64});
    for (const char* file : {"pairwise", "shapes", "adversarial"}) forward_cases(named.backend, file);
    forward_random_metadata(named.backend);
    for (const double scale : {0.01, 1., 3.}) {
      for (const double offset : {0., 3.}) forward_long(named.backend, scale, offset);
    }
    const GuardReport report = guard.report();
    ASSERT_GT(report.layers.size(), 50U);  // FLASHINFER_ATTN refuses most
    for (const GuardedLayer& layer : report.layers) {
      EXPECT_EQ(layer.failures, 0U) << layer.worst.text();
      EXPECT_EQ(layer.not_checked, 0U) << layer.reason;
    }
    const GuardFinding& worst = report.layers.front().worst;
    fmt::print("{}: {} problems, worst error {:.2f} of the bound: {:.1e} of {:.1e} in [{}]\n", named.member,
               report.layers.size(), worst.error / worst.bound, worst.error, worst.bound, worst.layer);
  }
}

TEST(Guard, QuantizedBackEndsNeedAnErrorOfTheirOwn) {
  for (const NamedBackend& named : chosen_backends()) {
    if (named.member != "SAGE_ATTN") continue;
    const auto failures = [&](std::optional<double> max_error) {
      const Guard guard({.every = 1, .max_error = max_error});
      forward_long(named.backend, 1, 0);
      const GuardReport report = guard.report();
      EXPECT_FALSE(report.layers.empty());
      fmt::print("{} by {:.1e}, allowed {:.1e}\n", named.member, report.layers.front().worst.error,
                 report.layers.front().worst.bound);
      return report.failures();
    };
    EXPECT_EQ(failures(0.1), 0U);
    EXPECT_GT(failures(std::nullopt), 0U);
  }
}

}  // namespace
}  // namespace ditattn::conformance
