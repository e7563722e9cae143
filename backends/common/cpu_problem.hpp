#pragma once

/// From a checked call to what the CPU kernels take. Shared by the CPU backends.

#include <ditattn/backend.hpp>
#include <ditattn/threads.hpp>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn {

/// Dtypes the CPU kernels compute.
inline const std::vector<DLDataType> kCpuDtypes = {kFloat32, kFloat16, kBFloat16};

inline kernels::cpu::ElementType element_type(DLDataType dtype) {
  if (dtype == kFloat32) return kernels::cpu::ElementType::float32;
  if (dtype == kFloat16) return kernels::cpu::ElementType::float16;
  if (dtype == kBFloat16) return kernels::cpu::ElementType::bfloat16;
  return kernels::cpu::ElementType::boolean;
}

/// Valid while `call` and the tensors in it are.
inline kernels::cpu::AttentionProblem to_cpu_problem(const AttentionCall& call, const AttentionImpl& impl,
                                                     CausalAlignment alignment) {
  const auto strides = [](const Tensor& tensor) {
    return kernels::cpu::Strides{.batch = tensor.stride(0), .token = tensor.stride(1), .head = tensor.stride(2)};
  };
  kernels::cpu::AttentionProblem problem{.batch = call.query.size(0),
                                         .heads = call.query.size(2),
                                         .kv_heads = call.key.size(2),
                                         .seq_q = call.query.size(1),
                                         .seq_kv = call.key.size(1),
                                         .head_size = call.query.size(3),
                                         .type = element_type(call.query.dtype()),
                                         .query = data_pointer(call.query),
                                         .key = data_pointer(call.key),
                                         .value = data_pointer(call.value),
                                         .out = data_pointer(call.out),
                                         .query_strides = strides(call.query),
                                         .key_strides = strides(call.key),
                                         .value_strides = strides(call.value),
                                         .out_strides = strides(call.out),
                                         .lse_strides = {},
                                         .scale = static_cast<float>(impl.softmax_scale()),
                                         .causal = impl.config().causal,
                                         .mask_strides = {}};
  problem.causal_offset = alignment == CausalAlignment::bottom_right ? problem.seq_kv - problem.seq_q : 0;
  if (call.lse.defined()) {
    problem.lse = static_cast<float*>(data_pointer(call.lse));
    problem.lse_strides = {.batch = call.lse.stride(0), .token = call.lse.stride(2), .head = call.lse.stride(1)};
  }
  if (const MaskView mask = call.mask_view(); mask.data != nullptr) {
    problem.mask = mask.data;
    problem.mask_type = element_type(mask.dtype);
    problem.mask_strides = {.batch = mask.strides[0], .token = mask.strides[2], .head = mask.strides[1]};
    problem.mask_key_stride = mask.strides[3];
  }
  if (const MaskDescription& mask = call.mask_description(); mask.kind == MaskDescription::Kind::key_prefix) {
    problem.kv_lengths = mask.kv_lengths.data();
    problem.kv_length_stride = mask.kv_lengths.size() > 1 ? 1 : 0;
  }
  return problem;
}

/// The process's thread pool, for the kernels.
inline kernels::cpu::Executor cpu_executor() { return {.threads = num_threads(), .parallel_for = &parallel_for}; }

}  // namespace ditattn
