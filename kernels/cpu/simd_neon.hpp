#pragma once

/// Advanced SIMD of ARMv8-A, which every aarch64 CPU has: fused multiply-add and half conversions, but no arithmetic on
/// halves (ARMv8.2) and no bfloat16 product (ARMv8.6).

#include <arm_neon.h>

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

struct Simd {
  using Vec = float32x4_t;
  static constexpr int kWidth = 4;
  static constexpr int kVectors = 4;  ///< vectors per panel row: 6 × 4 accumulators of 32 registers

  static Vec load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Vec v) { vst1q_f32(p, v); }
  static Vec set1(float x) { return vdupq_n_f32(x); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  /// b where either is NaN. Not vmaxq_f32, which gives the NaN, nor vmaxnmq_f32, which gives the number.
  static Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  /// a < b ? x : y; y where either is NaN.
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
  static Vec select_equal(Vec a, Vec b, Vec x, Vec y) { return vbslq_f32(vceqq_f32(a, b), x, y); }
  static float largest(Vec v) { return vmaxvq_f32(v); }  ///< of all lanes; none is NaN
  static bool any_not_equal(Vec a, Vec b) { return vminvq_u32(vceqq_f32(a, b)) == 0; }
  static bool any_nan(Vec v) { return any_not_equal(v, v); }

  static Vec round(Vec v) { return vrndnq_f32(v); }
  static Vec fraction(Vec x) { return sub(x, vrndmq_f32(x)); }  ///< x − ⌊x⌋
  static constexpr bool kScalesByAll = false;                   ///< whether `scale_by_power` takes all x
  /// v · 2^⌊x⌋ for x from −126 to 127.
  static Vec scale_by_power(Vec v, Vec x) {
    const int32x4_t exponent = vaddq_s32(vcvtmq_s32_f32(x), vdupq_n_s32(127));
    return mul(v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  /// 2^⌊log₂ x⌋ for x from 2⁻¹²⁶ on: the exponent alone.
  static Vec leading_power(Vec x) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7F800000)));
  }
  static Vec load_bf16(const std::uint16_t* p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16));
  }
  static Vec load_f16(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  /// Transposes kWidth vectors in place.
  static void transpose(Vec (&rows)[kWidth]) {
    const float32x4x2_t top = vtrnq_f32(rows[0], rows[1]);  // columns 0 and 2 of rows 0 and 1, then columns 1 and 3
    const float32x4x2_t bottom = vtrnq_f32(rows[2], rows[3]);
    for (int i = 0; i < 2; ++i) {
      const float64x2_t upper = vreinterpretq_f64_f32(top.val[i]);
      const float64x2_t lower = vreinterpretq_f64_f32(bottom.val[i]);
      rows[i] = vreinterpretq_f32_f64(vtrn1q_f64(upper, lower));
      rows[2 + i] = vreinterpretq_f32_f64(vtrn2q_f64(upper, lower));
    }
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
