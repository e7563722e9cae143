#pragma once

/// How SAGE_ATTN_3's kernels for products of NVFP4 are listed. Included by .cu files alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <type_traits>

#include "kernels/cuda/sage3_fp4.hpp"

namespace ditattn::kernels::cuda {

/// A kernel for each head size and dtype that these are compiled for. `function_of(std::type_identity<Config>)` is its
/// function.
template <template <class, int> class Config, class FunctionOf>
std::array<Sage3Fp4Kernel, 4> list_sage3_fp4(const char* name, const FunctionOf& function_of) {
  int index = 0;
  const auto kernel_of = [&]<class T, int kHead>(ElementType type) {
    using Own = Config<T, kHead>;
    return Sage3Fp4Kernel{.name = name,
                          .index = index++,
                          .head_size = kHead,
                          .rows = Own::kRows,
                          .type = type,
                          .shared_bytes = Own::kSharedBytes,
                          .function = function_of(std::type_identity<Own>{})};
  };
  return {kernel_of.template operator()<__half, 64>(ElementType::float16),
          kernel_of.template operator()<__half, 128>(ElementType::float16),
          kernel_of.template operator()<__nv_bfloat16, 64>(ElementType::bfloat16),
          kernel_of.template operator()<__nv_bfloat16, 128>(ElementType::bfloat16)};
}

}  // namespace ditattn::kernels::cuda
