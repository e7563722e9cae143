#pragma once

/// From a checked call to what our kernels take, on either device. Shared by their backends.

#include <ditattn/backend.hpp>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "kernels/attention_problem.hpp"

namespace ditattn {

/// What the CPU's exact backends have in common: everything the contract asks for.
inline Capabilities cpu_capabilities(std::string engine, CausalAlignment alignment) {
  return {.engine = std::move(engine),
          .devices = {"cpu"},
          .dtypes = {kFloat32, kFloat16, kBFloat16},
          .head_sizes = {},
          .masks = {"padding", "bool", "additive", "spans"},
          .gqa = true,
          .causal = true,
          .causal_alignment = alignment,
          .lse = true,
          .packed = true,
          .joint = true};
}

inline kernels::ElementType element_type(DLDataType dtype) {
  if (dtype == kFloat32) return kernels::ElementType::float32;
  if (dtype == kFloat16) return kernels::ElementType::float16;
  if (dtype == kBFloat16) return kernels::ElementType::bfloat16;
  return kernels::ElementType::boolean;
}

/// A plan and the problem that points into it. Valid while the call's tensors are.
struct KernelCall {
  CallPlan plan;
  kernels::AttentionProblem problem;
};

/// A dimension of one has the stride it would have in a contiguous tensor: whatever stands there is never used, but
/// engines look at it.
inline kernels::Strides strides_of(const Tensor& tensor) {
  const std::int64_t* size = tensor.GetDLTensorPtr()->shape;  // not checked at each look, as tensor.size(i) is
  const std::int64_t* stride = tensor.GetDLTensorPtr()->strides;
  const std::int64_t token = size[2] * size[3];
  return {.batch = size[0] == 1 ? size[1] * token : stride[0],
          .token = size[1] == 1 ? token : stride[1],
          .head = size[2] == 1 ? size[3] : stride[2]};
}

inline kernels::KeySegment to_kernel_segment(const KeySegment& segment) {
  kernels::KeySegment result{.key = data_pointer(segment.key),
                             .value = data_pointer(segment.value),
                             .key_strides = strides_of(segment.key),
                             .value_strides = strides_of(segment.value),
                             .first_key = segment.first_key,
                             .keys = segment.keys,
                             .mask = {}};
  if (const MaskDescription* prefix = segment.prefix; prefix != nullptr) {
    result.lengths = prefix->copies.get(prefix->kv_lengths, segment.key.device());
    result.length_stride = prefix->kv_lengths.size() > 1 ? 1 : 0;
    result.length_offset = segment.length_offset;
  }
  if (const MaskView& mask = segment.mask; mask.data != nullptr && mask.rows > 0) {  // of no rows it hides nothing
    result.mask = {.data = mask.data,
                   .type = element_type(mask.dtype),
                   .strides = {.batch = mask.strides[0], .token = mask.strides[2], .head = mask.strides[1]},
                   .key_stride = mask.strides[3],
                   .first_row = mask.first_row,
                   .rows = mask.rows};
  }
  return result;
}

inline KernelCall to_kernel_call(const AttentionCall& call, const AttentionImpl& impl, CausalAlignment alignment) {
  KernelCall result{.plan = call.plan(impl.config().causal, alignment), .problem = {}};
  const CallPlan& plan = result.plan;
  kernels::AttentionProblem& problem = result.problem;
  const std::int64_t* query = call.query.GetDLTensorPtr()->shape;
  problem.batch = query[0];
  problem.heads = query[2];
  problem.kv_heads = call.key.GetDLTensorPtr()->shape[2];
  problem.rows = plan.total_rows;
  problem.keys = plan.total_keys;
  problem.head_size = query[3];
  problem.type = problem.out_type = element_type(call.query.dtype());
  problem.scale = static_cast<float>(impl.softmax_scale());
  problem.num_queries = plan.num_queries;
  for (int i = 0; i < plan.num_queries; ++i) {
    problem.queries[i] = {.data = data_pointer(plan.queries[i].tensor),
                          .strides = strides_of(plan.queries[i].tensor),
                          .first_row = plan.queries[i].first_row};
  }
  problem.num_key_segments = plan.num_keys;
  for (int i = 0; i < plan.num_keys; ++i) problem.key_segments[i] = to_kernel_segment(plan.keys[i]);
  problem.out = data_pointer(call.out);
  problem.out_strides = strides_of(call.out);
  if (call.lse.defined()) {
    problem.lse = static_cast<float*>(data_pointer(call.lse));
    const std::int64_t* stride = call.lse.strides().data();
    problem.lse_strides = {.batch = stride[0], .token = stride[2], .head = stride[1]};
  }
  problem.causal = plan.causal;
  problem.causal_offset = plan.causal_offset;
  if (plan.ranges) {
    problem.ranges = plan.ranges->copies.get(plan.ranges->bounds, call.query.device());
    problem.range_batch_stride = plan.ranges->batch_stride;
  }
  return result;
}

/// The number of keys that all batch entries see, where lengths are all that hides keys and all are the same.
inline std::optional<std::int64_t> common_length(const KeySegment& segment) {
  if (segment.prefix == nullptr || segment.mask.data != nullptr) return std::nullopt;
  const auto& lengths = segment.prefix->kv_lengths;
  if (std::ranges::adjacent_find(lengths, std::not_equal_to()) != lengths.end()) return std::nullopt;
  return std::clamp<std::int64_t>(lengths.front() - segment.length_offset, 0, segment.keys);
}

/// The problem of one key segment without its keys from `length` on: to engines fewer keys cost less than masked ones.
inline void drop_keys_from(kernels::AttentionProblem& problem, std::int64_t length) {
  problem.keys = problem.key_segments[0].keys = length;
  problem.key_segments[0].lengths = nullptr;
}

}  // namespace ditattn
