#include "tests/conformance/random_problem.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace ditattn::conformance {
namespace {

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

Tensor draw_offsets(Draw& draw, std::int64_t total, std::int64_t parts) {
  const std::vector<std::int64_t> cuts = draw_cuts(draw, total, parts);
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

}  // namespace

Tensor Draw::normal(std::initializer_list<std::int64_t> shape, DLDataType dtype) {
  Tensor tensor = empty(shape, dtype);
  std::normal_distribution<double> distribution;
  for (std::int64_t i = 0; i < tensor.numel(); ++i)
    store_element(tensor.data_ptr(), i, dtype, distribution(generator_));
  return tensor;
}

std::vector<std::int64_t> draw_cuts(Draw& draw, std::int64_t total, std::int64_t parts) {
  std::vector<std::int64_t> cuts{0, total};
  for (std::int64_t i = 1; i < parts; ++i) cuts.push_back(draw.number(0, total));
  std::ranges::sort(cuts);
  return cuts;
}

Drawn draw_problem(std::uint64_t seed, const Capabilities& can, const Limits& limits,
                   std::span<const std::uint8_t> decisions) {
  Draw draw(seed, decisions);
  Drawn drawn;
  const std::int64_t batch = draw.number(1, 3);
  const std::int64_t kv_heads = draw.number(1, 3);
  const std::int64_t heads = kv_heads * draw.one_of({1, 1, 2, 4});
  std::vector<std::int64_t> head_sizes{1, 8, 40, 64, 72, 128};
  std::erase_if(head_sizes, [&](std::int64_t size) { return !can.head_sizes.contains(size); });
  const std::int64_t head_size = draw.one_of(head_sizes);
  const std::int64_t queries = draw.number(1, limits.queries);
  const std::int64_t keys = draw.number(1, limits.keys);
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
    const std::int64_t joint_queries = draw.number(0, limits.joint_queries);
    joint_keys = draw.number(0, limits.joint_keys);
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

void poison(const Drawn& drawn) {
  const AttentionMetadataFields& fields = drawn.metadata->fields;
  const std::int64_t keys = drawn.key.size(1);
  const std::int64_t valid = drawn.metadata->valid_kv_length(keys);
  const auto hides = [&](std::int64_t batch, std::int64_t key) {
    if (key >= valid) return true;
    if (!fields.attn_mask.has_value() || fields.attn_mask.value().ndim() != 2) return false;
    const Tensor& mask = fields.attn_mask.value();
    if (mask.size(1) != keys) return false;
    const double value = load_element(data_pointer(mask), batch * mask.stride(0) + key, mask.dtype());
    return mask.dtype() == kBool ? value == 0 : std::isinf(value);
  };
  const std::int64_t row = drawn.key.size(2) * drawn.key.size(3);
  for (std::int64_t i = 0; i < drawn.key.size(0) * keys; ++i) {
    if (!hides(i / keys, i % keys)) continue;
    for (std::int64_t d = 0; d < row; ++d) {
      store_element(data_pointer(drawn.key), i * row + d, drawn.key.dtype(), std::numeric_limits<double>::quiet_NaN());
      store_element(data_pointer(drawn.value), i * row + d, drawn.key.dtype(), d % 2 == 0 ? INFINITY : NAN);
    }
  }
}

double logit_size(const Drawn& drawn, double scale) {
  const auto longest = [](const Tensor& tensor) {
    double largest = 0;
    const std::int64_t size = tensor.size(3);
    for (std::int64_t i = 0; i < tensor.numel(); i += size) {
      double sum = 0;
      for (std::int64_t d = 0; d < size; ++d)
        sum += std::pow(load_element(tensor.data_ptr(), i + d, tensor.dtype()), 2);
      if (std::isfinite(sum)) largest = std::max(largest, std::sqrt(sum));
    }
    return largest;
  };
  const auto with_joint = [&](const Tensor& image, const tvm::ffi::Optional<Tensor>& joint) {
    return std::max(longest(image), joint.has_value() ? longest(joint.value()) : 0.);
  };
  const AttentionMetadataFields& fields = drawn.metadata->fields;
  return with_joint(drawn.query, fields.joint_query) * with_joint(drawn.key, fields.joint_key) * std::abs(scale);
}

double bound_for(const Drawn& drawn, const Tensor& out, double scale) {
  if (out.dtype() == kFloat32) return 2e-6 * std::max(1.0, logit_size(drawn, scale) / 32);
  const bool large = out.numel() >= 1000;
  if (out.dtype() == kBFloat16) return large ? 2.5e-3 : 4e-3;
  return large ? 3.5e-4 : 6e-4;
}

Errors errors_of(const Tensor& out, const Tensor& lse, const reference::Result& expected) {
  const std::int64_t heads = out.size(2);
  const std::int64_t rows = out.size(1);
  const std::int64_t size = out.size(3);
  double error = 0;
  double result = 0;
  double random = 0;
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
      random += std::pow(expected.random[r * size + d], 2);
      norm += std::pow(expected.abs[r * size + d], 2);
    }
  }
  if (norm == 0) return {.out = std::sqrt(error), .lse = lse_error};
  return {.out = std::sqrt(error / norm), .lse = lse_error, .result_share = std::sqrt(std::max(result, random) / norm)};
}

}  // namespace ditattn::conformance
