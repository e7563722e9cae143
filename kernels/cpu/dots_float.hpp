#pragma once

/// Products of 8-bit numbers where the CPU has no fast ones: as float32, whose sums are exact too, because they stay
/// below 2²⁴ (127 · 127 · 256, 255 · 127 · 128). Included after tile_elements_impl.hpp.

namespace ditattn::kernels::cpu {
namespace {

struct Dots {
  static constexpr int kPack = 1;               ///< numbers of the summed dimension in one 4-byte unit
  static constexpr int kKeyMost = 127;          ///< |number| of K at most; Q's and V's are 127 always
  static constexpr int kKeyOffset = 0;          ///< what is added to K's numbers, and taken off the sums again
  static constexpr int kProbabilityMost = 255;  ///< P's numbers are 0 to this

  using Sums = Vec;
  static void store_sums(float* at, Vec whole_numbers) { Simd::store(at, whole_numbers); }
  static Vec to_floats(Sums sums) { return sums; }

  /// What one step of the micro-kernel adds: a is K or V, b is Q or P.
  struct Terms {
    using Sums = Vec;
    static Sums zero() { return Simd::set1(0); }
    static Sums load(const float* sums) { return Simd::load(sums); }
    static Sums add(Vec a, Vec b, Sums sums) { return Simd::fma(a, b, sums); }
  };
  using Logits = Terms;
  using Values = Terms;

  /// Numbers to the nearest whole ones, kPack vectors as one of units.
  static Vec join(const Vec (&x)[kPack]) { return Simd::round(x[0]); }
  /// kWidth successive numbers of a row, from number `first` on.
  static void store_row(float* units, std::int64_t first, Vec x) { Simd::store(units + first, Simd::round(x)); }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
