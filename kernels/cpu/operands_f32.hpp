#pragma once

/// Operands of the products as float32, whatever the elements. Included after tile_elements_impl.hpp.

namespace ditattn::kernels::cpu {
namespace {

struct Operands {
  static constexpr int kPack = 1;               ///< elements of the summed dimension in one 4-byte unit
  static constexpr bool kQueryIsScaled = true;  ///< Q is multiplied by the scale when it is loaded

  /// c + a · b per lane, summed over the elements of a unit.
  static Vec multiply_add(Vec a, Vec b, Vec c) { return Simd::fma(a, b, c); }

  /// One row of `count` elements as units.
  static void load_row(const char* source, ElementType type, std::int64_t count, float* units) {
    widen_row(source, type, count, units);
  }
  /// kPack rows of V, or `keys` of them and zeros, as one row of `count` units. True if all of it is finite.
  static bool load_values(const char* source, ElementType type, std::int64_t /*stride_bytes*/, int /*keys*/,
                          std::int64_t count, float* units) {
    return !Simd::any_nan(widen_row(source, type, count, units));
  }
  /// kPack successive keys' probabilities as one vector of units.
  static void store_packed(float* at, const Vec (&p)[kPack]) { Simd::store(at, p[0]); }
  /// A vector of units with zero for each element i of the lanes in which seen[i] is 0.
  static Vec zero_unless(const Vec (&seen)[kPack], Vec units) {
    const Vec zero = Simd::set1(0);
    return Simd::select_equal(seen[0], zero, zero, units);
  }

  /// 2^r for |r| ≤ 1/2, least relative error among degree 5 with p(0) = 1: 8.1e-8, 1.6e-7 with rounding.
  static Vec exp2_fraction(Vec r) {
    Vec p = Simd::set1(0.0013274633F);
    p = Simd::fma(p, r, Simd::set1(0.009671962F));
    p = Simd::fma(p, r, Simd::set1(0.055506784F));
    p = Simd::fma(p, r, Simd::set1(0.24022235F));
    p = Simd::fma(p, r, Simd::set1(0.69314706F));
    return Simd::fma(p, r, Simd::set1(1));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
