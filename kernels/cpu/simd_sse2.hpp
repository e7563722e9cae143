#pragma once

/// The baseline's vocabulary: SSE2, which every x86-64 CPU has. No fused multiply-add, no half conversions.

#include <emmintrin.h>

#include <cstdint>
#include <cstring>

namespace ditattn::kernels::cpu {
namespace {

struct Simd {
  using Vec = __m128;
  static constexpr int kWidth = 4;
  static constexpr int kVectors = 2;  ///< vectors per panel row: 6 × 2 accumulators of 16 registers

  static Vec load(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm_storeu_ps(p, v); }
  static Vec set1(float x) { return _mm_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
  /// b where either is NaN.
  static Vec max(Vec a, Vec b) { return _mm_max_ps(a, b); }
  /// a < b ? x : y; y where either is NaN.
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) { return select(_mm_cmplt_ps(a, b), x, y); }
  static Vec select_equal(Vec a, Vec b, Vec x, Vec y) { return select(_mm_cmpeq_ps(a, b), x, y); }
  /// Of all lanes; none is NaN.
  static float largest(Vec v) {
    const __m128 two = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static bool any_not_equal(Vec a, Vec b) { return _mm_movemask_ps(_mm_cmpneq_ps(a, b)) != 0; }
  static bool any_nan(Vec v) { return _mm_movemask_ps(_mm_cmpunord_ps(v, v)) != 0; }

  /// Nearest whole number, |v| < 2²²: adding 1.5 · 2²³ leaves it in the low bits.
  static Vec round(Vec v) {
    const Vec magic = set1(12582912.0F);
    return sub(add(v, magic), magic);
  }
  static Vec floor(Vec v) {
    const Vec nearest = round(v);
    return sub(nearest, _mm_and_ps(_mm_cmpgt_ps(nearest, v), set1(1)));
  }
  static Vec fraction(Vec x) { return sub(x, floor(x)); }  ///< x − ⌊x⌋
  static constexpr bool kScalesByAll = false;              ///< whether `scale_by_power` takes all x
  /// v · 2^⌊x⌋ for x from −126 to 127.
  static Vec scale_by_power(Vec v, Vec x) {
    return mul(v, _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(_mm_cvtps_epi32(floor(x)), _mm_set1_epi32(127)), 23)));
  }
  /// 2^⌊log₂ x⌋ for x from 2⁻¹²⁶ on: the exponent alone.
  static Vec leading_power(Vec x) { return _mm_and_ps(x, _mm_castsi128_ps(_mm_set1_epi32(0x7F800000))); }
  static Vec load_bf16(const std::uint16_t* p) {
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), half));
  }
  /// Half to float by float arithmetic: exponent rebased by a multiplication, which renormalises subnormals too; Inf
  /// and NaN get their exponent set.
  static Vec load_f16(const std::uint16_t* p) {
    const __m128i half = _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_setzero_si128());
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(half, _mm_set1_epi32(0x8000)), 16);
    const __m128i magnitude = _mm_and_si128(half, _mm_set1_epi32(0x7FFF));
    const __m128i rebased = _mm_castps_si128(mul(_mm_castsi128_ps(_mm_slli_epi32(magnitude, 13)), set1(0x1p112F)));
    const __m128i special =
        _mm_and_si128(_mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7BFF)), _mm_set1_epi32(0x7F800000));
    return _mm_castsi128_ps(_mm_or_si128(_mm_or_si128(rebased, special), sign));
  }
  /// Transposes kWidth vectors in place.
  static void transpose(Vec (&rows)[kWidth]) { _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]); }

 private:
  static Vec select(Vec mask, Vec x, Vec y) { return _mm_or_ps(_mm_and_ps(mask, x), _mm_andnot_ps(mask, y)); }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
