#pragma once

/// How kernels read Q, K and V. Included by .cu files alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "kernels/cuda/flash_layout.hpp"

namespace ditattn::kernels::cuda {

/// Calls `quantize` for the problem's dtype, and whether Q, K and V are read in pieces of 16 bytes.
template <class Quantize>
void for_inputs(const AttentionProblem& p, const Quantize& quantize) {
  const bool aligned =
      p.head_size % 8 == 0 && all_inputs(p, [](const void* data, const Extents& extents, const Strides& strides) {
        return extents.tokens == 0 || (is_aligned(data) && has_aligned_strides(extents, strides));
      });
  const auto of_dtype = [&]<class T>() {
    aligned ? quantize.template operator()<T, true>() : quantize.template operator()<T, false>();
  };
#ifdef DITATTN_CUDA_NO_FLOAT16
  if (p.type != ElementType::bfloat16) throw std::logic_error("a dtype that no kernel was compiled for");
  of_dtype.template operator()<__nv_bfloat16>();
#else
  p.type == ElementType::bfloat16 ? of_dtype.template operator()<__nv_bfloat16>()
                                  : of_dtype.template operator()<__half>();
#endif
}

}  // namespace ditattn::kernels::cuda
