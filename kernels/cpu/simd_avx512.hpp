#pragma once

/// AVX-512 F, BW, DQ, VL: Skylake-X (2017), Zen 4 (2022) and later.

#include <immintrin.h>

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

struct Simd {
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kVectors = 4;  ///< vectors per panel row: 6 × 4 accumulators of 32 registers

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec set1(float x) { return _mm512_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  /// b where either is NaN.
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  /// a < b ? x : y; y where either is NaN.
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static Vec select_equal(Vec a, Vec b, Vec x, Vec y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), y, x);
  }
  static float largest(Vec v) { return _mm512_reduce_max_ps(v); }  ///< of all lanes; none is NaN
  static bool any_not_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }
  static bool any_nan(Vec v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }

  static Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  /// x − ⌊x⌋; 0 for ±∞.
  static Vec fraction(Vec x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static constexpr bool kScalesByAll = true;  ///< whether `scale_by_power` takes all x
  /// v · 2^⌊x⌋.
  static Vec scale_by_power(Vec v, Vec x) { return _mm512_scalef_ps(v, x); }
  /// 2^⌊log₂ x⌋ for x from 2⁻¹²⁶ on: the exponent alone.
  static Vec leading_power(Vec x) { return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x7F800000))); }
  static Vec load_bf16(const std::uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Vec load_f16(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  /// Transposes kWidth vectors in place.
  static void transpose(Vec (&rows)[kWidth]) {
    Vec pairs[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    Vec quads[16];  // quads[4 i + j]: columns j, 4 + j, 8 + j, 12 + j of rows 4 i to 4 i + 3
    for (int i = 0; i < 16; i += 4) {
      for (int j = 0; j < 2; ++j) {
        const __m512d low = _mm512_castps_pd(pairs[i + j]);
        const __m512d high = _mm512_castps_pd(pairs[i + 2 + j]);
        quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    }
    for (int j = 0; j < 4; ++j) {
      const Vec even_top = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);  // columns j and 8 + j of rows 0 to 7
      const Vec odd_top = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xDD);   // columns 4 + j and 12 + j
      const Vec even_bottom = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
      const Vec odd_bottom = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xDD);
      rows[j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0x88);
      rows[8 + j] = _mm512_shuffle_f32x4(even_top, even_bottom, 0xDD);
      rows[4 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88);
      rows[12 + j] = _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xDD);
    }
  }

  // Whole numbers of 32 bits, for 8-bit products.
  using Ints = __m512i;
  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static Ints load_ints(const float* p) { return _mm512_loadu_si512(p); }
  static Vec bits(Ints v) { return _mm512_castsi512_ps(v); }
  static Ints to_ints(Vec v) { return _mm512_cvtps_epi32(v); }  ///< to nearest
  static Vec to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  /// The low bytes of four vectors as one: x[0]'s is the lowest of each lane.
  static Vec join_bytes(const Ints (&x)[4]) {
    const __m512i byte = _mm512_set1_epi32(0xFF);
    const __m512i low =
        _mm512_or_si512(_mm512_and_si512(x[0], byte), _mm512_slli_epi32(_mm512_and_si512(x[1], byte), 8));
    const __m512i high = _mm512_or_si512(_mm512_and_si512(x[2], byte), _mm512_slli_epi32(x[3], 8));
    return bits(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  /// kWidth bytes in the order of the lanes.
  static void store_bytes(void* p, Ints v) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  /// sums + Σ of four products per lane; an unsigned byte may be 127 at most, or 16-bit sums would saturate.
  static Ints add_byte_products(Vec of_unsigned, Vec of_signed, Ints sums) {
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_castps_si512(of_unsigned), _mm512_castps_si512(of_signed));
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
