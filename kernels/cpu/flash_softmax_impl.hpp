/// Masking and the online softmax of one panel. Included after flash_multiply_impl.hpp.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

// 2^x for x ≤ 0; 0 for −∞, NaN for NaN. Below −126, where results are subnormal, which is slow on some CPUs and weighs
// nothing, 0 too where that costs no instruction less.
Vec exp2_negative(Vec x) {
  const Vec lowest = Simd::set1(Simd::kScalesToZero ? -200 : -126);
  const Vec clamped = Simd::max(lowest, x);  // x where x is NaN
  const Vec n = Simd::round(clamped);
  const Vec p = Operands::exp2_fraction(Simd::sub(clamped, n));
  const Vec scaled = Simd::scale_by_power(p, n);
  return Simd::kScalesToZero ? scaled : Simd::select_less(x, lowest, Simd::set1(0), scaled);
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

// One panel of logits, which times `unit` are to the base 2, to probabilities relative to the new maximum, packed as
// operands; updates max and sum, leaves rescale.
void softmax(float* logits, float unit, float* max, float* sum, float* rescale, int keys) {
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec zero = Simd::set1(0);
  const Vec scale = Simd::set1(unit);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    const Vec old_max = Simd::load(max + v);
    Vec block_max = hidden;
    for (int key = 0; key < keys; ++key) block_max = Simd::max(block_max, Simd::load(logits + key * kLanes + v));
    const Vec new_max = Simd::max(old_max, Operands::kQueryIsScaled ? block_max : Simd::mul(block_max, scale));
    // A row that has seen no key yet: subtract 0, so that −∞ gives e^−∞ = 0 and not NaN.
    const Vec subtract = Simd::select_equal(new_max, hidden, zero, new_max);
    const Vec add = Simd::sub(zero, subtract);
    Vec total = zero;
    for (int key = 0; key < keys; key += Operands::kPack) {
      Vec p[Operands::kPack];
#pragma GCC unroll 2
      for (int i = 0; i < Operands::kPack; ++i) {
        p[i] = zero;
        if (key + i >= keys) continue;
        const Vec s = Simd::load(logits + (key + i) * kLanes + v);
        // Rounded twice, as where `hide` has scaled it: a row's bits must not depend on its neighbours' masks.
        const Vec scaled = Operands::kQueryIsScaled ? s : Simd::mul(s, scale);
        p[i] = exp2_negative(Simd::add(scaled, add));
        total = Simd::add(total, p[i]);
      }
      Operands::store_packed(logits + key / Operands::kPack * kLanes + v, p);
    }
    const Vec shrink = exp2_negative(Simd::add(old_max, add));
    Simd::store(rescale + v, shrink);
    Simd::store(sum + v, Simd::fma(Simd::load(sum + v), shrink, total));
    Simd::store(max + v, new_max);
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu
