/// Exponentials, and hiding what rows do not see. Included after tile_rows_impl.hpp.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

// 2^x for x ≤ 8; 0 for −∞, NaN for NaN. Below −126, where results are subnormal and weigh nothing, 0 too unless that
// costs an instruction.
template <class Fraction = Operands>
Vec exp2_negative(Vec x) {
  const Vec lowest = Simd::set1(-126);
  const Vec exponent = Simd::kScalesByAll ? x : Simd::max(lowest, x);  // x where x is NaN
  const Vec scaled = Simd::scale_by_power(Fraction::exp2_fraction(Simd::fraction(exponent)), exponent);
  return Simd::kScalesByAll ? scaled : Simd::select_less(x, lowest, Simd::set1(0), scaled);
}

// For P of 8 bits: of degree 3, 8.6e-05.
struct Exp2Short {
  static Vec exp2_fraction(Vec r) {
    Vec p = Simd::set1(0.077066995F);
    p = Simd::fma(p, r, Simd::set1(0.22764507F));
    p = Simd::fma(p, r, Simd::set1(0.69511676F));
    return Simd::fma(p, r, Simd::set1(1));
  }
};

// The largest logit of each row of a panel. Side by side: a maximum is waited for longer than it takes.
void find_largest(const float* logits, int keys, Vec (&largest)[Simd::kVectors]) {
  for (Vec& x : largest) x = Simd::set1(-kInfinity);
  for (int key = 0; key < keys; ++key) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) {
      largest[v] = Simd::max(largest[v], Simd::load(logits + key * kLanes + v * Simd::kWidth));
    }
  }
}

// Zeros after `units` of P up to a whole step of the products.
void fill_last_step(float* lanes, int units) {
  for (; units % kUnitStep != 0; ++units) Simd::store(lanes + units * kLanes, Simd::set1(0));
}

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
