#pragma once

#include <array>
#include <cstdint>

#include "backends/common/cuda_engine.hpp"
#include "backends/cudnn_attn/sdpa_graph.hpp"
#include "kernels/cuda/fp8_tensors.hpp"

namespace ditattn {

/// Q, K and V in FP8, in a call's scratch memory.
class Fp8Parts {
 public:
  Fp8Parts() = default;
  /// Adds what it needs to `parts`; the spec's tensors are these.
  Fp8Parts(cudnn::SdpaSpec& spec, Parts& parts)
      : query_(parts.add(bytes(spec, spec.rows, spec.heads))),
        key_(parts.add(bytes(spec, spec.keys, spec.kv_heads))),
        value_(parts.add(bytes(spec, spec.keys, spec.kv_heads))),
        scales_(parts.add(sizeof(kernels::cuda::Fp8Scales))) {
    const auto contiguous = [&](std::int64_t tokens, std::int64_t heads) {
      return std::array{tokens * heads * spec.head_size, heads * spec.head_size, spec.head_size};
    };
    spec.query_strides = contiguous(spec.rows, spec.heads);
    spec.key_strides = spec.value_strides = contiguous(spec.keys, spec.kv_heads);
  }

  void write(const kernels::AttentionProblem& problem, char* memory, const kernels::cuda::Launch& launch) const {
    write_fp8(problem, memory + query_, memory + key_, memory + value_, scales(memory), launch);
  }
  void point_to(char* memory, cudnn::SdpaPointers& pointers) const {
    pointers.query = memory + query_;
    pointers.key = memory + key_;
    pointers.value = memory + value_;
    pointers.fp8_scales = scales(memory);
  }

 private:
  static std::int64_t bytes(const cudnn::SdpaSpec& spec, std::int64_t tokens, std::int64_t heads) {
    return spec.batch * tokens * heads * spec.head_size;
  }
  [[nodiscard]] kernels::cuda::Fp8Scales* scales(char* memory) const {
    return reinterpret_cast<kernels::cuda::Fp8Scales*>(memory + scales_);
  }

  std::int64_t query_ = 0;
  std::int64_t key_ = 0;
  std::int64_t value_ = 0;
  std::int64_t scales_ = 0;
};

}  // namespace ditattn
