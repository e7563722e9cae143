/// Exponentials, and hiding what rows do not see. Included after tile_rows_impl.hpp.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

// 2^x for x ≤ 0; 0 for −∞, NaN for NaN. Below −126, where results are subnormal, which is slow on some CPUs and weighs
// nothing, 0 too where that costs no instruction less.
template <class Fraction = Operands>
Vec exp2_negative(Vec x) {
  const Vec lowest = Simd::set1(Simd::kScalesToZero ? -200 : -126);
  const Vec clamped = Simd::max(lowest, x);  // x where x is NaN
  const Vec n = Simd::round(clamped);
  const Vec p = Fraction::exp2_fraction(Simd::sub(clamped, n));
  const Vec scaled = Simd::scale_by_power(p, n);
  return Simd::kScalesToZero ? scaled : Simd::select_less(x, lowest, Simd::set1(0), scaled);
}

// For P of 8 bits: of degree 3, 1.0e-04.
struct Exp2Short {
  static Vec exp2_fraction(Vec r) {
    Vec p = Simd::set1(0.05500893F);
    p = Simd::fma(p, r, Simd::set1(0.24221096F));
    p = Simd::fma(p, r, Simd::set1(0.69328293F));
    return Simd::fma(p, r, Simd::set1(1));
  }
};

// Scales one panel of logits by `unit`, adds the mask times log2 e, and hides what the mask and the ranges hide.
// Selects rather than adds: a hidden NaN must go.
void hide(float* logits, float unit, const float* bias, const float* first, const float* limit, int keys) {
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec scale = Simd::set1(unit);
  const Vec log2_e = Simd::set1(kLog2E);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    const Vec seen_from = Simd::load(first + v);
    const Vec seen_to = Simd::load(limit + v);
    for (int key = 0; key < keys; ++key) {
      float* at = logits + key * kLanes + v;
      Vec s = Operands::kQueryIsScaled ? Simd::load(at) : Simd::mul(Simd::load(at), scale);
      if (bias != nullptr) {
        const Vec b = Simd::load(bias + key * kLanes + v);
        s = Simd::select_equal(b, hidden, hidden, Simd::add(s, Simd::mul(b, log2_e)));
      }
      const Vec position = Simd::set1(static_cast<float>(key));
      s = Simd::select_less(position, seen_from, hidden, s);
      Simd::store(at, Simd::select_less(position, seen_to, s, hidden));
    }
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu
