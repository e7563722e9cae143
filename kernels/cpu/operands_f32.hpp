#pragma once

/// Operands of the products as float32, whatever the elements. Included after flash_elements_impl.hpp.

namespace ditattn::kernels::cpu {
namespace {

// Widens a block of K or V; true if all of it is finite.
bool widen_block(const char* base, ElementType type, std::int64_t stride, int rows, std::int64_t count,
                 float* destination, std::int64_t pitch) {
  const std::int64_t bytes = element_bytes(type);
  Vec finite = Simd::set1(0);
  for (int i = 0; i < rows; ++i) {
    const char* source = base + i * stride * bytes;
    if (i + kRowsAhead < rows) prefetch_row(source + kRowsAhead * stride * bytes, count * bytes);
    finite = Simd::add(finite, widen_row(source, type, count, destination + i * pitch));
  }
  return !Simd::any_nan(finite);
}

struct Operands {
  static constexpr int kPack = 1;               ///< elements of the summed dimension in one 4-byte unit
  static constexpr bool kQueryIsScaled = true;  ///< Q is multiplied by the scale when it is loaded

  /// c + a · b per lane, summed over the elements of a unit.
  static Vec multiply_add(Vec a, Vec b, Vec c) { return Simd::fma(a, b, c); }

  /// One row of `count` elements as units.
  static void load_row(const char* source, ElementType type, std::int64_t count, float* units) {
    widen_row(source, type, count, units);
  }
  /// A block of K: units run along a row. True if all of it is finite.
  static bool load_keys(const char* base, ElementType type, std::int64_t stride, int rows, std::int64_t count,
                        float* units, std::int64_t pitch) {
    return widen_block(base, type, stride, rows, count, units, pitch);
  }
  /// A block of V: units run down a column. True if all of it is finite.
  static bool load_values(const char* base, ElementType type, std::int64_t stride, int rows, std::int64_t count,
                          float* units, std::int64_t pitch) {
    return widen_block(base, type, stride, rows, count, units, pitch);
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
