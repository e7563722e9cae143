/// Masking and the online softmax of one panel. Included after flash_multiply_impl.hpp.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

// 2^x for x ≤ 0; 0 below −126 (subnormals are slow on some CPUs and weigh nothing), NaN for NaN.
Vec exp2_negative(Vec x) {
  const Vec lowest = Simd::set1(-126);
  const Vec clamped = Simd::max(lowest, x);  // x where x is NaN
  const Vec n = Simd::round(clamped);
  const Vec p = Operands::exp2_fraction(Simd::sub(clamped, n));
  return Simd::select_less(x, lowest, Simd::set1(0), Simd::scale_by_power(p, n));
}

// Hides what the mask and the ranges hide in one panel of logits. Selects rather than adds: a hidden NaN must go.
void hide(float* logits, const float* bias, const float* first, const float* limit, int keys) {
  const Vec hidden = Simd::set1(-kInfinity);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    const Vec seen_from = Simd::load(first + v);
    const Vec seen_to = Simd::load(limit + v);
    for (int key = 0; key < keys; ++key) {
      float* at = logits + key * kLanes + v;
      Vec s = Simd::load(at);
      if (bias != nullptr) {
        const Vec b = Simd::load(bias + key * kLanes + v);
        s = Simd::select_equal(b, hidden, hidden, Simd::add(s, b));
      }
      const Vec position = Simd::set1(static_cast<float>(key));
      s = Simd::select_less(position, seen_from, hidden, s);
      Simd::store(at, Simd::select_less(position, seen_to, s, hidden));
    }
  }
}

// One panel of logits, in units of `unit`, to probabilities relative to the new maximum, packed as operands; updates
// max and sum, leaves rescale.
void softmax(float* logits, float unit, float* max, float* sum, float* rescale, int keys) {
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec zero = Simd::set1(0);
  const Vec factor = Simd::set1(unit * 1.44269504F);  // e^x = 2^(x · log2 e)
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    const Vec old_max = Simd::load(max + v);
    Vec new_max = old_max;
    for (int key = 0; key < keys; ++key) new_max = Simd::max(new_max, Simd::load(logits + key * kLanes + v));
    // A row that has seen no key yet: subtract 0, so that −∞ gives e^−∞ = 0 and not NaN.
    const Vec subtract = Simd::select_equal(new_max, hidden, zero, new_max);
    const auto power = [&](Vec x) { return exp2_negative(Simd::mul(Simd::sub(x, subtract), factor)); };
    Vec total = zero;
    for (int key = 0; key < keys; key += Operands::kPack) {
      Vec p[Operands::kPack];
#pragma GCC unroll 2
      for (int i = 0; i < Operands::kPack; ++i) {
        p[i] = key + i < keys ? power(Simd::load(logits + (key + i) * kLanes + v)) : zero;
        total = Simd::add(total, p[i]);
      }
      Operands::store_packed(logits + key / Operands::kPack * kLanes + v, p);
    }
    const Vec shrink = power(old_max);
    Simd::store(rescale + v, shrink);
    Simd::store(sum + v, Simd::fma(Simd::load(sum + v), shrink, total));
    Simd::store(max + v, new_max);
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu
