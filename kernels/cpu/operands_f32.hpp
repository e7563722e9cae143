#pragma once

/// Operands of the products as float32, whatever the elements. Included after tile_elements_impl.hpp.

namespace ditattn::kernels::cpu {
namespace {

struct Operands {
  static constexpr int kPack = 1;               ///< elements of the summed dimension in one 4-byte unit
  static constexpr bool kQueryIsScaled = true;  ///< Q is multiplied by the scale when it is loaded

  using Sums = Vec;
  static Vec zero() { return Simd::set1(0); }
  static Vec load(const float* sums) { return Simd::load(sums); }
  /// sums + a · b per lane, summed over the elements of a unit.
  static Vec add(Vec a, Vec b, Vec sums) { return Simd::fma(a, b, sums); }

  /// One row of `count` elements as units.
  static void load_row(const char* source, ElementType type, std::int64_t count, float* units) {
    widen_row(source, type, count, units);
  }
  /// The same of floats that units hold exactly; zeros follow up to a whole unit and vector.
  static void pack_row(const float* row, std::int64_t count, float* units) {
    for (std::int64_t i = 0; i < count; i += Simd::kWidth) Simd::store(units + i, Simd::load(row + i));
  }
  /// kPack rows of V, or `keys` of them and zeros, as one row of `count` units. True if all of it is finite.
  static bool load_values(const char* source, ElementType type, std::int64_t /*stride_bytes*/, int /*keys*/,
                          std::int64_t count, float* units) {
    return !Simd::any_nan(widen_row(source, type, count, units));
  }
  /// kPack successive keys' probabilities as one vector of units.
  static void store_packed(float* at, const Vec (&p)[kPack]) { Simd::store(at, p[0]); }
  /// With zero for what is not finite.
  static Vec finite_or_zero(Vec units) {
    return Simd::select_equal(Simd::sub(units, units), Simd::set1(0), units, Simd::set1(0));
  }

  static Vec exp2_fraction(Vec r) { return Exp2Long::exp2_fraction(r); }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
