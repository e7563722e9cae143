#pragma once

/// AVX2 with FMA and F16C: Haswell (2013), Zen (2017) and later.

#include <immintrin.h>

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

struct Simd {
  using Vec = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kVectors = 2;  ///< vectors per panel row: 6 × 2 accumulators of 16 registers

  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec set1(float x) { return _mm256_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  /// b where either is NaN.
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  /// a < b ? x : y; y where either is NaN.
  static Vec select_less(Vec a, Vec b, Vec x, Vec y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static Vec select_equal(Vec a, Vec b, Vec x, Vec y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  }
  /// Of all lanes; none is NaN.
  static float largest(Vec v) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static bool any_not_equal(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0; }
  static bool any_nan(Vec v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }

  static Vec round(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Vec fraction(Vec x) { return sub(x, _mm256_floor_ps(x)); }  ///< x − ⌊x⌋
  static constexpr bool kScalesByAll = false;                        ///< whether `scale_by_power` takes all x
  /// v · 2^⌊x⌋ for x from −126 to 127.
  static Vec scale_by_power(Vec v, Vec x) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x)), _mm256_set1_epi32(127));
    return mul(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  /// 2^⌊log₂ x⌋ for x from 2⁻¹²⁶ on: the exponent alone.
  static Vec leading_power(Vec x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7F800000))); }
  static Vec load_bf16(const std::uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Vec load_f16(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  /// Transposes kWidth vectors in place.
  static void transpose(Vec (&rows)[kWidth]) {
    Vec pairs[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    Vec quads[8];  // quads[4 i + j]: column j of rows 4 i to 4 i + 3 in the lower half, column 4 + j in the upper
    for (int i = 0; i < 8; i += 4) {
      for (int j = 0; j < 2; ++j) {
        const __m256d low = _mm256_castps_pd(pairs[i + j]);
        const __m256d high = _mm256_castps_pd(pairs[i + 2 + j]);
        quads[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
        quads[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
      }
    }
    for (int j = 0; j < 4; ++j) {
      rows[j] = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20);
      rows[4 + j] = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31);
    }
  }

  // Whole numbers of 32 bits, for 8-bit products.
  using Ints = __m256i;
  static Ints zero_ints() { return _mm256_setzero_si256(); }
  static Ints load_ints(const float* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Vec bits(Ints v) { return _mm256_castsi256_ps(v); }
  static Ints to_ints(Vec v) { return _mm256_cvtps_epi32(v); }  ///< to nearest
  static Vec to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  /// The low bytes of four vectors as one: x[0]'s is the lowest of each lane.
  static Vec join_bytes(const Ints (&x)[4]) {
    const __m256i byte = _mm256_set1_epi32(0xFF);
    const __m256i low =
        _mm256_or_si256(_mm256_and_si256(x[0], byte), _mm256_slli_epi32(_mm256_and_si256(x[1], byte), 8));
    const __m256i high = _mm256_or_si256(_mm256_and_si256(x[2], byte), _mm256_slli_epi32(x[3], 8));
    return bits(_mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
  }
  /// kWidth bytes in the order of the lanes.
  static void store_bytes(void* p, Ints v) {
    const __m256i first_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                                                 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i halves = _mm256_shuffle_epi8(v, first_bytes);
    const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storel_epi64(static_cast<__m128i*>(p), both);
  }
  /// sums + Σ of four products per lane; an unsigned byte may be 127 at most, or 16-bit sums would saturate.
  static Ints add_byte_products(Vec of_unsigned, Vec of_signed, Ints sums) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_castps_si256(of_unsigned), _mm256_castps_si256(of_signed));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
