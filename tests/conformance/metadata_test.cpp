// Random problems over all metadata (joint tokens, packed sequences, valid prefixes, spans with query ranges, masks,
// GQA, causal) against the float64 oracle, for every back end, on --device. The bounds are those of the case files.
// Back ends that do not take everything get head sizes and dtypes that they take; what else they refuse is counted.

#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "backends/reference/reference.hpp"
#include "tests/conformance/options.hpp"
#include "tests/conformance/run_case.hpp"

namespace ditattn {
namespace {

constexpr int kProblems = 500;
constexpr int kGpuProblems = 1000;
constexpr std::uint64_t kFirstSeed = 20260;

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : generator_(seed) {}
  std::int64_t number(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(generator_);
  }
  bool chance(double p) { return std::bernoulli_distribution(p)(generator_); }
  std::int64_t one_of(const std::vector<std::int64_t>& values) {
    return values[static_cast<std::size_t>(number(0, static_cast<std::int64_t>(values.size()) - 1))];
  }
  Tensor normal(std::initializer_list<std::int64_t> shape, DLDataType dtype) {
    Tensor tensor = empty(shape, dtype);
    std::normal_distribution<double> distribution;
    for (std::int64_t i = 0; i < tensor.numel(); ++i)
      store_element(tensor.data_ptr(), i, dtype, distribution(generator_));
    return tensor;
  }

 private:
  std::mt19937_64 generator_;
};

struct Drawn {
  ImplConfig config;
  Tensor query, key, value;
  AttentionMetadata metadata;
  std::int64_t rows = 0;
  std::string text;
};

Tensor draw_mask(Draw& draw, std::initializer_list<std::int64_t> shape) {
  const bool boolean = draw.chance(0.7);
  Tensor mask = empty(shape, boolean ? kBool : kFloat32);
  const double seen = draw.chance(0.5) ? 0.7 : 0.2;
  for (std::int64_t i = 0; i < mask.numel(); ++i) {
    const bool keep = draw.chance(seen);
    const double added = keep ? static_cast<double>(draw.number(-3, 3)) : -INFINITY;
    store_element(mask.data_ptr(), i, mask.dtype(), boolean ? static_cast<double>(keep) : added);
  }
  return mask;
}

// Sorted cut points of [0, total], `parts` + 1 of them, empty parts included.
Tensor draw_offsets(Draw& draw, std::int64_t total, std::int64_t parts) {
  std::vector<std::int64_t> cuts{0, total};
  for (std::int64_t i = 1; i < parts; ++i) cuts.push_back(draw.number(0, total));
  std::ranges::sort(cuts);
  Tensor tensor = empty({parts + 1}, kInt32);
  for (std::int64_t i = 0; i <= parts; ++i) store_element(tensor.data_ptr(), i, kInt32, static_cast<double>(cuts[i]));
  return tensor;
}

std::vector<Span> draw_spans(Draw& draw, std::int64_t keys) {
  std::vector<Span> spans;
  for (std::int64_t at = 0; at < keys && draw.chance(0.7);) {
    const std::int64_t begin = draw.number(at, keys - 1);
    const std::int64_t end = draw.number(begin + 1, keys);
    spans.push_back({begin, end});
    at = end;
  }
  return spans;
}

Drawn draw_problem(std::uint64_t seed, const Capabilities& can) {
  Draw draw(seed);
  Drawn drawn;
  const std::int64_t batch = draw.number(1, 3);
  const std::int64_t kv_heads = draw.number(1, 3);
  const std::int64_t heads = kv_heads * draw.one_of({1, 1, 2, 4});
  std::vector<std::int64_t> head_sizes{1, 8, 40, 64, 72, 128};
  std::erase_if(head_sizes, [&](std::int64_t size) { return !can.head_sizes.contains(size); });
  const std::int64_t head_size = draw.one_of(head_sizes);
  const std::int64_t queries = draw.number(1, 200);
  const std::int64_t keys = draw.number(1, 300);
  DLDataType dtype = draw.chance(0.6) ? kFloat32 : draw.chance(0.5) ? kFloat16 : kBFloat16;
  if (std::ranges::find(can.dtypes, dtype) == can.dtypes.end()) dtype = kBFloat16;
  drawn.config = {.num_heads = heads, .head_size = head_size, .causal = draw.chance(0.3), .num_kv_heads = kv_heads};
  drawn.query = draw.normal({batch, queries, heads, head_size}, dtype);
  drawn.key = draw.normal({batch, keys, kv_heads, head_size}, dtype);
  drawn.value = draw.normal({batch, keys, kv_heads, head_size}, dtype);
  drawn.rows = queries;
  drawn.text = fmt::format("seed {}: B={} H={} Hkv={} Sq={} Skv={} D={} {}{}", seed, batch, heads, kv_heads, queries,
                           keys, head_size, dtype_name(dtype), drawn.config.causal ? " causal" : "");

  AttentionMetadataFields fields;
  std::int64_t total_keys = keys;
  if (draw.chance(0.25)) {
    total_keys = draw.number(0, keys);
    fields.extra.Set("valid_kv_length", total_keys);
    drawn.text += fmt::format(" valid={}", total_keys);
  }
  const bool packed = draw.chance(0.25);
  std::int64_t joint_keys = 0;
  if (!packed && draw.chance(0.5)) {
    const std::int64_t joint_queries = draw.number(0, 40);
    joint_keys = draw.number(0, 150);
    fields.joint_query = draw.normal({batch, joint_queries, heads, head_size}, dtype);
    fields.joint_key = draw.normal({batch, joint_keys, kv_heads, head_size}, dtype);
    fields.joint_value = draw.normal({batch, joint_keys, kv_heads, head_size}, dtype);
    fields.joint_strategy = draw.chance(0.5) ? "front" : "rear";
    drawn.rows += joint_queries;
    total_keys += joint_keys;
    drawn.text += fmt::format(" joint={}x{} {}", joint_queries, joint_keys, fields.joint_strategy);
    if (joint_keys > 0 && draw.chance(0.5)) fields.joint_attn_mask = draw_mask(draw, {batch, joint_keys});
  }
  if (packed) {
    const std::int64_t parts = draw.number(1, 5);
    fields.extra.Set("cu_seqlens_q", draw_offsets(draw, queries, parts));
    fields.extra.Set("cu_seqlens_k", draw_offsets(draw, total_keys, parts));
    fields.extra.Set("max_seqlen_q", queries);
    fields.extra.Set("max_seqlen_k", total_keys);
    drawn.text += fmt::format(" packed={}", parts);
  } else if (draw.chance(0.3)) {
    const std::int64_t samples = draw.chance(0.5) ? 1 : batch;
    fields.full_attn_spans.emplace();
    for (std::int64_t i = 0; i < samples; ++i) fields.full_attn_spans->push_back(draw_spans(draw, total_keys));
    if (draw.chance(0.5)) {
      const std::int64_t cut = draw.number(0, drawn.rows);
      fields.query_ranges = {{0, cut, draw.number(0, 50)}, {cut, drawn.rows, draw.number(50, 200)}};
    }
    drawn.text += fmt::format(" spans={}", samples);
  }
  switch (draw.number(0, 5)) {
    case 0:
      fields.attn_mask = draw_mask(draw, {batch, keys});
      break;
    case 1:
      fields.attn_mask = draw_mask(draw, {batch, 1, queries, keys});
      break;
    case 2:
      fields.joint_attn_mask = {};  // the joined mask speaks of the text's keys too
      fields.attn_mask = draw_mask(draw, {1, heads, drawn.rows, keys + joint_keys});
      break;
    case 3:
      fields.attn_mask = draw_mask(draw, {1, 1, 1, keys});
      break;
    default:
      break;
  }
  if (fields.attn_mask.has_value()) drawn.text += " mask=" + shape_name(fields.attn_mask.value());
  drawn.metadata = AttentionMetadata(std::move(fields));
  return drawn;
}

// Largest |q|·|k|·scale: logits of that size lose their last digits in float32.
double logit_size(const Drawn& drawn, double scale) {
  const auto longest = [](const Tensor& tensor) {
    double largest = 0;
    const std::int64_t size = tensor.size(3);
    for (std::int64_t i = 0; i < tensor.numel(); i += size) {
      double sum = 0;
      for (std::int64_t d = 0; d < size; ++d)
        sum += std::pow(load_element(tensor.data_ptr(), i + d, tensor.dtype()), 2);
      largest = std::max(largest, std::sqrt(sum));
    }
    return largest;
  };
  return longest(drawn.query) * longest(drawn.key) * scale;
}

double bound_for(const Drawn& drawn, const Tensor& out, double scale) {
  if (out.dtype() == kFloat32) return 2e-6 * std::max(1.0, logit_size(drawn, scale) / 32);
  const bool large = out.numel() >= 1000;
  if (out.dtype() == kBFloat16) return large ? 2.5e-3 : 4e-3;
  return large ? 3.5e-4 : 6e-4;
}

struct Errors {
  double out = 0;           // ‖out − ref‖ / ‖Σ P·|V|‖
  double lse = 0;           // the largest
  double result_share = 1;  // ‖ref‖ / ‖Σ P·|V|‖
};

// Rows without keys must be exactly zero and −∞.
Errors compare(const Tensor& out, const Tensor& lse, const reference::Result& expected) {
  const std::int64_t heads = out.size(2);
  const std::int64_t rows = out.size(1);
  const std::int64_t size = out.size(3);
  double error = 0;
  double result = 0;
  double norm = 0;
  double lse_error = 0;
  for (std::int64_t r = 0; r < static_cast<std::int64_t>(expected.lse.size()); ++r) {
    const std::int64_t row = r % rows;
    const std::int64_t head = r / rows % heads;
    const std::int64_t batch = r / rows / heads;
    const double got = load_element(lse.data_ptr(), r, kFloat32);
    if (std::isinf(expected.lse[r])) {
      EXPECT_EQ(got, expected.lse[r]);
    } else {
      lse_error = std::max(lse_error, std::abs(got - expected.lse[r]) / std::max(1.0, std::abs(expected.lse[r])));
    }
    for (std::int64_t d = 0; d < size; ++d) {
      const double value = load_element(out.data_ptr(), ((batch * rows + row) * heads + head) * size + d, out.dtype());
      if (std::isinf(expected.lse[r])) {
        EXPECT_EQ(value, 0);
      }
      error += std::pow(value - expected.out[r * size + d], 2);
      result += std::pow(expected.out[r * size + d], 2);
      norm += std::pow(expected.abs[r * size + d], 2);
    }
  }
  if (norm == 0) return {.out = std::sqrt(error), .lse = lse_error};
  return {.out = std::sqrt(error / norm), .lse = lse_error, .result_share = std::sqrt(result / norm)};
}

class Metadata : public testing::TestWithParam<const char*> {};

TEST_P(Metadata, RandomProblemsMatchTheOracle) {
  const DLDevice device = conformance::options().device;
  BackendClass backend;
  try {
    backend = DiffusionAttentionBackendEnum::from_name(GetParam()).get_class();
    backend->validate_available();
  } catch (const ImportError& error) {
    GTEST_SKIP() << "skipped: " << error.message();
  }
  Capabilities can = backend->capabilities();
  if (std::ranges::count(can.devices, device_type_name(device)) == 0) {
    GTEST_SKIP() << GetParam() << " does not compute on " << device_name(device);
  }
  std::erase_if(can.dtypes, [&](DLDataType dtype) {  // on a GPU there may be fewer
    return !backend->explain({.head_size = 64, .dtype = dtype, .device = device});
  });
  const conformance::NamedBackend named{.member = GetParam(), .backend = backend};
  const conformance::Quantization quantized = conformance::quantization(named, device);
  const bool takes_all = can.packed && can.joint && can.has_mask("spans") && can.has_mask("additive");
  double worst = 0;
  double worst_lse = 0;
  int refused = 0;
  const int problems = device.device_type == kDLCPU ? kProblems : kGpuProblems;
  for (int i = 0; i < problems; ++i) {
    const Drawn drawn = draw_problem(kFirstSeed + static_cast<std::uint64_t>(i), can);
    SCOPED_TRACE(drawn.text);
    const auto impl = backend->make(drawn.config);
    Tensor lse = empty(std::array{drawn.query.size(0), drawn.config.num_heads, drawn.rows}, kFloat32, device);
    Tensor out;
    try {
      out = impl->forward(copy_to(drawn.query, device), copy_to(drawn.key, device), copy_to(drawn.value, device),
                          copy_to(drawn.metadata, device), {.lse = lse});
      out = copy_to(out, kCpu);
      lse = copy_to(lse, kCpu);
    } catch (const ValueError& error) {
      ASSERT_FALSE(takes_all) << error.message();
      ++refused;
      continue;
    }
    const reference::Result expected =
        reference::attention(drawn.query, drawn.key, drawn.value, drawn.metadata, impl->softmax_scale(),
                             drawn.config.causal, can.causal_alignment);
    const Errors errors = compare(out, lse, expected);
    const double logits = logit_size(drawn, impl->softmax_scale());
    const double bound = bound_for(drawn, out, impl->softmax_scale()) +
                         conformance::quantized_error_bound(quantized, logits, errors.result_share);
    EXPECT_LE(errors.out, bound);
    EXPECT_LE(errors.lse, 1e-5 + conformance::quantized_lse_bound(quantized, logits) +
                              conformance::own_lse_bound(named, drawn.query.dtype()));
    worst = std::max(worst, errors.out / bound);
    worst_lse = std::max(worst_lse, errors.lse);
    if (HasFailure()) break;
  }
  std::cout << fmt::format("{}: {} problems, {} refused, worst error {:.2f} of the bound, LSE {:.1e}\n", GetParam(),
                           problems, refused, worst, worst_lse);
  EXPECT_GE(problems - refused, can.joint ? 200 : 100);
}

INSTANTIATE_TEST_SUITE_P(, Metadata,
                         testing::Values("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN",
                                         "FLASHINFER_ATTN"),
                         [](const auto& instance) { return std::string(instance.param); });

}  // namespace
}  // namespace ditattn
