#include "registry/check_call.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "ditattn/errors.hpp"
#include "registry/check_metadata.hpp"
#include "registry/check_tensor.hpp"
#include "registry/memory_overlap.hpp"

namespace ditattn {
namespace {

void check_shape(const char* what, const Tensor& tensor, std::initializer_list<std::int64_t> expected) {
  if (tensor.ndim() != static_cast<int>(expected.size()) ||
      !std::equal(expected.begin(), expected.end(), tensor.shape().begin())) {
    throw ValueError(fmt::format("{} must have shape {}, got {}.", what,
                                 shape_name(std::span(expected.begin(), expected.size())), shape_name(tensor)));
  }
}

void check_no_overlap(const char* what, const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value,
                      const AttentionMetadata& metadata) {
  if (overlaps_itself(out)) {
    throw ValueError(
        fmt::format("{} of shape {} has strides {}: its elements overlap.", what, shape_name(out), strides_name(out)));
  }
  const MemoryRange range = range_of(out);
  const auto check = [&](const char* other, const Tensor& tensor) {
    if (range.meets(range_of(tensor)) && share_memory(out, tensor))
      throw ValueError(fmt::format("{} shares memory with {}.", what, other));
  };
  check("query", query);
  check("key", key);
  check("value", value);
  if (!metadata.defined()) return;
  const auto check_optional = [&](const char* other, const tvm::ffi::Optional<Tensor>& tensor) {
    if (tensor.has_value()) check(other, tensor.value());
  };
  check_optional("attn_mask", metadata->fields.attn_mask);
  check_optional("joint_query", metadata->fields.joint_query);
  check_optional("joint_key", metadata->fields.joint_key);
  check_optional("joint_value", metadata->fields.joint_value);
  check_optional("joint_attn_mask", metadata->fields.joint_attn_mask);
}

}  // namespace

Problem check_call(const AttentionImpl& impl, const Tensor& query, const Tensor& key, const Tensor& value,
                   const AttentionMetadata& metadata) {
  check_input("query", query);
  check_input("key", key);
  check_input("value", value);
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
  if (!std::ranges::equal(value.shape(), key.shape())) {
    throw ValueError(
        fmt::format("Key and value must have the same shape, got {} and {}.", shape_name(key), shape_name(value)));
  }
  return problem_of(impl, query, key, value, metadata);
}

Problem problem_of(const AttentionImpl& impl, const Tensor& query, const Tensor& key, const Tensor& value,
                   const AttentionMetadata& metadata) {
  const std::int64_t* rows = query.shape().data();
  const std::int64_t* keys = key.shape().data();
  Problem problem{.batch = rows[0],
                  .num_heads = rows[2],
                  .num_kv_heads = keys[2],
                  .seq_q = rows[1],
                  .seq_kv = keys[1],
                  .head_size = rows[3],
                  .dtype = query.dtype(),
                  .device = query.device(),
                  .causal = impl.config().causal,
                  .alignment = std::min({alignment_of(query), alignment_of(key), alignment_of(value)})};
  if (metadata.defined()) {
    check_metadata(*metadata.operator->(), query, key, impl.backend().capabilities().causal_alignment, problem);
  }
  return problem;
}

void check_outputs(const ForwardOutputs& outputs, const Problem& problem, const Tensor& query, const Tensor& key,
                   const Tensor& value, const AttentionMetadata& metadata) {
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
    check_shape("out", outputs.out, {problem.batch, problem.seq_q, problem.num_heads, problem.head_size});
    check_unit_last_stride("out", outputs.out);
    check("out", outputs.out, query.dtype());
  }
  if (outputs.lse.defined()) {
    check_shape("lse", outputs.lse, {problem.batch, problem.num_heads, problem.seq_q});
    check("lse", outputs.lse, kFloat32);
  }
  if (outputs.out.defined() && outputs.lse.defined() && share_memory(outputs.out, outputs.lse)) {
    throw ValueError("out shares memory with lse.");
  }
}

}  // namespace ditattn
