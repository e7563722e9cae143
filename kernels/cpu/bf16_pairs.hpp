#pragma once

/// Operands of the products as pairs of bfloat16: products are exact, sums float32; subnormal inputs count as zero, as
/// the instructions define. Q, K and V are taken as they are; P is rounded to bfloat16. Included after
/// tile_elements_impl.hpp.

namespace ditattn::kernels::cpu {
namespace {

struct Bf16Pairs {
  static constexpr int kPack = 2;
  static constexpr bool kQueryIsScaled = false;

  using Sums = Vec;
  static Vec zero() { return Simd::set1(0); }
  static Vec load(const float* sums) { return Simd::load(sums); }

  // Masked, so that nothing past the row is read, and an odd row ends in a zero.
  static void load_row(const char* source, ElementType /*type*/, std::int64_t count, float* units) {
    std::int64_t i = 0;
    for (; i + 32 <= count; i += 32) _mm512_storeu_si512(units + i / 2, _mm512_loadu_si512(source + i * 2));
    if (i == count) return;
    const auto rest = static_cast<__mmask32>((1U << (count - i)) - 1);
    _mm512_storeu_si512(units + i / 2, _mm512_maskz_loadu_epi16(rest, source + i * 2));
  }

  static void pack_row(const float* row, std::int64_t count, float* units) {
    for (std::int64_t i = 0; i < count; i += 32, units += 16) {
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + i + 16), _mm512_loadu_ps(row + i));
      _mm512_storeu_si512(units, __builtin_bit_cast(__m512i, both));
    }
  }

  // A unit is one column of both rows.
  static bool load_values(const char* source, ElementType /*type*/, std::int64_t stride_bytes, int keys,
                          std::int64_t count, float* units) {
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    __mmask32 special = 0;
    for (std::int64_t i = 0; i < count; i += 16) {
      const auto lanes = static_cast<__mmask16>(count - i < 16 ? (1U << (count - i)) - 1 : 0xFFFF);
      const auto load = [&](const char* from) {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from + i * 2));
      };
      const __m512i high = keys > 1 ? _mm512_slli_epi32(load(source + stride_bytes), 16) : _mm512_setzero_si512();
      const __m512i pair = _mm512_or_si512(load(source), high);
      special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pair, exponent), exponent);
      _mm512_storeu_si512(units + i, pair);
    }
    return special == 0;
  }

  static void store_packed(float* at, const Vec (&p)[kPack]) {
    alignas(64) static constexpr std::uint16_t interleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(p[1], p[0]));
    _mm512_storeu_si512(at, _mm512_permutexvar_epi16(_mm512_load_si512(interleave), both));
  }
  static Vec finite_or_zero(Vec units) {
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    const __m512i pairs = _mm512_castps_si512(units);
    const __mmask32 finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(finite, pairs));
  }

  /// As for float32, of degree 4: 3.0e-6 with rounding, where P is rounded to 2e-3 afterwards.
  static Vec exp2_fraction(Vec r) {
    Vec p = Simd::set1(0.0134267F);
    p = Simd::fma(p, r, Simd::set1(0.05224244F));
    p = Simd::fma(p, r, Simd::set1(0.24128023F));
    p = Simd::fma(p, r, Simd::set1(0.69304484F));
    return Simd::fma(p, r, Simd::set1(1));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
