#pragma once

/// kernels/nvfp4.hpp's rounding in fewer steps: to nearest, ties to even. What is added moves the last mantissa bit to
/// the sum's last. Included by .cu files alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

/// What 16-bit floats need to round to e2m1 in pairs.
template <class T>
struct PairRounding;
template <>
struct PairRounding<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr std::uint32_t kExponents = 0x7F807F80;
  static constexpr float kMove = 64;  // times a number's leading power: sums have the steps of e2m1 there
  __device__ static std::uint32_t cut(float a, float b) {
    std::uint32_t x;
    asm("cvt.rz.bf16x2.f32 %0, %2, %1;" : "=r"(x) : "f"(a), "f"(b));
    return x;
  }
  __device__ static Pair both(float x) { return __float2bfloat162_rn(x); }
};
template <>
struct PairRounding<__half> {
  using Pair = __half2;
  static constexpr std::uint32_t kExponents = 0x7C007C00;
  static constexpr float kMove = 512;
  __device__ static std::uint32_t cut(float a, float b) {
    std::uint32_t x;
    asm("cvt.rz.f16x2.f32 %0, %2, %1;" : "=r"(x) : "f"(a), "f"(b));
    return x;
  }
  __device__ static Pair both(float x) { return __float2half2_rn(x); }
};

/// The nearest e2m1 of two numbers from 0 to 16, 6 at most, times `scale`. Cut off at 16 bits, of which the last is
/// then 1, numbers stay on their side of what lies between two of e2m1: they are rounded once. Such that lie there
/// exactly go up.
template <class T>
__device__ __forceinline__ std::uint32_t round_pair_to_e2m1(float a, float b, std::uint32_t scale, T) {
  using Rounding = PairRounding<T>;
  using Pair = typename Rounding::Pair;
  const std::uint32_t cut = Rounding::cut(a, b) | 0x00010001;
  const Pair x = reinterpret_cast<const Pair&>(cut);
  const Pair above_one = __hmax2(x, Rounding::both(1));
  const std::uint32_t leading_bits = reinterpret_cast<const std::uint32_t&>(above_one) & Rounding::kExponents;
  const Pair leading = reinterpret_cast<const Pair&>(leading_bits);
  const Pair moved = __hfma2(leading, Rounding::both(Rounding::kMove), x);
  const Pair rounded = __hfma2(leading, Rounding::both(-Rounding::kMove), moved);
  const Pair product = __hmul2(__hmin2(rounded, Rounding::both(E2m1::kMost)), reinterpret_cast<const Pair&>(scale));
  return reinterpret_cast<const std::uint32_t&>(product);
}

}  // namespace ditattn::kernels::cuda
