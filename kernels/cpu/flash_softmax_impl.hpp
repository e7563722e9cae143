/// The online softmax of one panel. Included after tile_softmax_impl.hpp.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

// One panel of logits, which times `unit` are to the base 2, to probabilities relative to the new maximum, packed as
// operands; updates max and sum, leaves rescale.
void softmax(float* logits, float unit, float* max, float* sum, float* rescale, int keys) {
  const Vec hidden = Simd::set1(-kInfinity);
  const Vec zero = Simd::set1(0);
  const Vec scale = Simd::set1(unit);
  Vec largest[Simd::kVectors];
  find_largest(logits, keys, largest);
  for (int v = 0; v < kLanes; v += Simd::kWidth) {
    const Vec old_max = Simd::load(max + v);
    const Vec block_max = largest[v / Simd::kWidth];
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
    fill_last_step(logits + v, (keys + Operands::kPack - 1) / Operands::kPack);
    const Vec shrink = exp2_negative(Simd::add(old_max, add));
    Simd::store(rescale + v, shrink);
    Simd::store(sum + v, Simd::fma(Simd::load(sum + v), shrink, total));
    Simd::store(max + v, new_max);
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu
