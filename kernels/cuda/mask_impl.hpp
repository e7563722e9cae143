#pragma once

/// Elements of any float type, and of masks, on the device. Included by .cu files alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/attention_problem.hpp"

namespace ditattn::kernels::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

__device__ inline std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

/// What element `index` of a mask adds to a logit; −∞ where it hides.
__device__ inline float load_mask(const Mask& mask, std::int64_t index) {
  switch (mask.type) {
    case ElementType::boolean:
      return static_cast<const unsigned char*>(mask.data)[index] != 0 ? 0 : -INFINITY;
    case ElementType::float16:
      return widen(static_cast<const __half*>(mask.data)[index]);
    case ElementType::bfloat16:
      return widen(static_cast<const __nv_bfloat16*>(mask.data)[index]);
    default:
      return static_cast<const float*>(mask.data)[index];
  }
}

}  // namespace ditattn::kernels::cuda
