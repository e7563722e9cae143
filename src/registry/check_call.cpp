#include "registry/check_call.hpp"

#include <fmt/format.h>

#include <array>

#include "ditattn/errors.hpp"
#include "registry/memory_overlap.hpp"

namespace ditattn {
namespace {

bool same_device(DLDevice a, DLDevice b) { return a.device_type == b.device_type && a.device_id == b.device_id; }

std::string strides_name(const Tensor& tensor) {
  return shape_name({tensor.strides().data(), static_cast<std::size_t>(tensor.ndim())});
}

void check_defined(const char* what, const Tensor& tensor) {
  if (!tensor.defined()) throw ValueError(fmt::format("{} is missing.", what));
}

// Sizes are not negative, and the farthest element's offset in bytes fits in 63 bits.
void check_extent(const char* what, const Tensor& tensor) {
  std::int64_t count = 1;
  std::int64_t reach = tensor.dtype().bits / 8;
  bool overflow = false;
  for (int i = 0; i < tensor.ndim(); ++i) {
    const std::int64_t size = tensor.size(i);
    if (size < 0) throw ValueError(fmt::format("{} has a negative size: {}.", what, shape_name(tensor)));
    std::int64_t span = 0;
    const std::int64_t stride = tensor.stride(i);
    overflow |= stride == INT64_MIN || __builtin_mul_overflow(count, size, &count) ||
                __builtin_mul_overflow(stride < 0 ? -stride : stride, size > 0 ? size - 1 : 0, &span) ||
                __builtin_mul_overflow(span, tensor.dtype().bits / 8, &span) ||
                __builtin_add_overflow(reach, span, &reach);
  }
  if (overflow) {
    throw ValueError(fmt::format("{} of shape {} and strides {} reaches past what can be addressed.", what,
                                 shape_name(tensor), strides_name(tensor)));
  }
  if (count > 0 && tensor.data_ptr() == nullptr) {
    throw ValueError(fmt::format("{} of shape {} has a null data pointer.", what, shape_name(tensor)));
  }
}

void check_unit_last_stride(const char* what, const Tensor& tensor) {
  if (tensor.size(-1) > 1 && tensor.stride(-1) != 1) {
    throw ValueError(
        fmt::format("{} must have a unit last stride, got strides {} for shape {}. Make it contiguous first.", what,
                    strides_name(tensor), shape_name(tensor)));
  }
}

void check_rank_4(const char* what, const Tensor& tensor) {
  check_defined(what, tensor);
  if (tensor.ndim() != 4) {
    throw ValueError(fmt::format("{} must have 4 dimensions (batch, tokens, heads, head_size), got shape {}.", what,
                                 shape_name(tensor)));
  }
  if (tensor.dtype().lanes != 1 || tensor.dtype().bits % 8 != 0) {
    throw ValueError(
        fmt::format("{} has dtype {}, which is not a plain element type.", what, dtype_name(tensor.dtype())));
  }
  check_extent(what, tensor);
  check_unit_last_stride(what, tensor);
}

void check_size(const char* what, const Tensor& tensor, int dimension, const char* name, std::int64_t expected) {
  if (tensor.size(dimension) != expected) {
    throw ValueError(fmt::format("{} has {}={}, expected {} (shape {}).", what, name, tensor.size(dimension), expected,
                                 shape_name(tensor)));
  }
}

void check_shape(const char* what, const Tensor& tensor, std::initializer_list<std::int64_t> expected) {
  if (tensor.ndim() != static_cast<int>(expected.size()) ||
      !std::equal(expected.begin(), expected.end(), tensor.shape().begin())) {
    throw ValueError(fmt::format("{} must have shape {}, got {}.", what,
                                 shape_name(std::span(expected.begin(), expected.size())), shape_name(tensor)));
  }
}

// The mask is bool or a float, on the same device, and broadcasts to (B, H, Sq, Skv); two dimensions are (B, Skv).
void check_mask(const Tensor& mask, const Tensor& query, const Tensor& key) {
  const DLDataType dtype = mask.dtype();
  if (dtype != kBool && dtype != kFloat32 && dtype != kFloat16 && dtype != kBFloat16) {
    throw ValueError(
        fmt::format("attn_mask has dtype {}. Valid dtypes are: bool (true = attend), and float32, float16, "
                    "bfloat16 (added to the logits).",
                    dtype_name(dtype)));
  }
  if (!same_device(mask.device(), query.device())) {
    throw ValueError(
        fmt::format("attn_mask is on {}, query on {}.", device_name(mask.device()), device_name(query.device())));
  }
  if (mask.ndim() < 1 || mask.ndim() > 4) {
    throw ValueError(fmt::format("attn_mask must have 1 to 4 dimensions, got shape {}.", shape_name(mask)));
  }
  check_extent("attn_mask", mask);
  const std::array<std::int64_t, 4> full = {query.size(0), query.size(2), query.size(1), key.size(1)};
  const auto broadcasts = [&](int from_end, std::int64_t to) {
    return from_end > mask.ndim() || mask.size(-from_end) == to || mask.size(-from_end) == 1;
  };
  const bool fits = mask.ndim() == 2 ? broadcasts(2, full[0]) && mask.size(1) == full[3]
                                     : broadcasts(1, full[3]) && broadcasts(2, full[2]) && broadcasts(3, full[1]) &&
                                           broadcasts(4, full[0]);
  if (fits) return;
  const char* hint = mask.ndim() == 2
                         ? " Two dimensions are (batch, keys); give a (queries, keys) mask as (1, 1, queries, keys)."
                         : "";
  throw ValueError(fmt::format("attn_mask of shape {} does not broadcast to (batch, heads, queries, keys) = {}.{}",
                               shape_name(mask), shape_name(full), hint));
}

MaskKind mask_kind(const AttentionMetadata& metadata) {
  if (!metadata.defined() || !metadata->fields.attn_mask.has_value()) return MaskKind::none;
  const MaskDescription& description = metadata->mask_description();
  if (description.kind == MaskDescription::Kind::none) return MaskKind::none;
  if (description.kind == MaskDescription::Kind::key_prefix) return MaskKind::padding;
  const Tensor& mask = metadata->fields.attn_mask.value();
  if (mask.dtype() != kBool) return MaskKind::additive;
  const auto constant = [&](int from_end) {
    return mask.ndim() < from_end || mask.size(-from_end) == 1 || mask.stride(-from_end) == 0;
  };
  return mask.ndim() == 2 || (constant(2) && constant(3)) ? MaskKind::padding : MaskKind::boolean;
}

void check_no_overlap(const char* what, const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value,
                      const AttentionMetadata& metadata) {
  if (overlaps_itself(out)) {
    throw ValueError(
        fmt::format("{} of shape {} has strides {}: its elements overlap.", what, shape_name(out), strides_name(out)));
  }
  const auto check = [&](const char* other, const Tensor& tensor) {
    if (share_memory(out, tensor)) throw ValueError(fmt::format("{} shares memory with {}.", what, other));
  };
  check("query", query);
  check("key", key);
  check("value", value);
  if (metadata.defined() && metadata->fields.attn_mask.has_value())
    check("attn_mask", metadata->fields.attn_mask.value());
}

}  // namespace

Problem check_call(const AttentionImpl& impl, const Tensor& query, const Tensor& key, const Tensor& value,
                   const AttentionMetadata& metadata) {
  check_rank_4("query", query);
  check_rank_4("key", key);
  check_rank_4("value", value);
  if (key.dtype() != query.dtype() || value.dtype() != query.dtype()) {
    throw ValueError(fmt::format("Query, key, and value must have the same dtype, got {}, {} and {}.",
                                 dtype_name(query.dtype()), dtype_name(key.dtype()), dtype_name(value.dtype())));
  }
  if (!same_device(key.device(), query.device()) || !same_device(value.device(), query.device())) {
    throw ValueError(fmt::format("Query, key, and value must be on the same device, got {}, {} and {}.",
                                 device_name(query.device()), device_name(key.device()), device_name(value.device())));
  }
  check_size("query", query, 2, "heads", impl.config().num_heads);
  check_size("query", query, 3, "head_size", impl.config().head_size);
  check_size("key", key, 0, "batch", query.size(0));
  check_size("key", key, 2, "heads", impl.num_kv_heads());
  check_size("key", key, 3, "head_size", impl.config().head_size);
  for (int i = 0; i < 4; ++i) {
    if (value.size(i) != key.size(i)) {
      throw ValueError(
          fmt::format("Key and value must have the same shape, got {} and {}.", shape_name(key), shape_name(value)));
    }
  }
  if (metadata.defined() && metadata->fields.attn_mask.has_value()) {
    check_mask(metadata->fields.attn_mask.value(), query, key);
  }
  return {.batch = query.size(0),
          .num_heads = query.size(2),
          .num_kv_heads = key.size(2),
          .seq_q = query.size(1),
          .seq_kv = key.size(1),
          .head_size = query.size(3),
          .dtype = query.dtype(),
          .device = query.device(),
          .mask = mask_kind(metadata),
          .causal = impl.config().causal,
          .lse = false};
}

void check_outputs(const ForwardOutputs& outputs, const Tensor& query, const Tensor& key, const Tensor& value,
                   const AttentionMetadata& metadata) {
  const auto check = [&](const char* what, const Tensor& tensor, DLDataType dtype) {
    if (tensor.dtype() != dtype) {
      throw ValueError(
          fmt::format("{} has dtype {}, expected {}.", what, dtype_name(tensor.dtype()), dtype_name(dtype)));
    }
    if (!same_device(tensor.device(), query.device())) {
      throw ValueError(
          fmt::format("{} is on {}, query on {}.", what, device_name(tensor.device()), device_name(query.device())));
    }
    check_extent(what, tensor);
    check_no_overlap(what, tensor, query, key, value, metadata);
  };
  if (outputs.out.defined()) {
    check_shape("out", outputs.out, {query.size(0), query.size(1), query.size(2), query.size(3)});
    check_unit_last_stride("out", outputs.out);
    check("out", outputs.out, query.dtype());
  }
  if (outputs.lse.defined()) {
    check_shape("lse", outputs.lse, {query.size(0), query.size(2), query.size(1)});
    check("lse", outputs.lse, kFloat32);
  }
  if (outputs.out.defined() && outputs.lse.defined() && share_memory(outputs.out, outputs.lse)) {
    throw ValueError("out shares memory with lse.");
  }
}

}  // namespace ditattn
