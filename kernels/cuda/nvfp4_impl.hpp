#pragma once

/// kernels/nvfp4.hpp's rounding in fewer steps: to nearest, ties to even. What is added moves the last mantissa bit to
/// the sum's last. Included by .cu files alone.

#include "kernels/sage3.hpp"

namespace ditattn::kernels::cuda {

/// For 0 ≤ x ≤ 448.
__device__ __forceinline__ float round_to_e4m3(float x) {
  const float leading = __uint_as_float(__float_as_uint(fmaxf(x, 1.F / 64)) & 0x7F800000);
  const float moved = fmaf(leading, 1 << 20, x);
  return fmaf(leading, -(1 << 20), moved);
}

/// For 0 ≤ x ≤ 448, not limited to 6.
__device__ __forceinline__ float round_to_e2m1(float x) {
  const float leading = __uint_as_float(__float_as_uint(fmaxf(x, 1)) & 0x7F800000);
  const float moved = fmaf(leading, 1 << 22, x);
  return fmaf(leading, -(1 << 22), moved);
}

}  // namespace ditattn::kernels::cuda
