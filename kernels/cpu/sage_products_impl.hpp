/// The two products of quantized attention, each with what makes numbers of its sums. Included after a `Dots`.

#include <cstdint>

#include "kernels/cpu/rate_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

// Quantized V: P's numbers against V's.
struct ByteValues {
  static constexpr bool kQuantized = true;
  static constexpr int kPack = Dots::kPack;
  static constexpr float kMost = Dots::kProbabilityMost;
  using Terms = Dots::Values;
  static Vec to_floats(Dots::Sums sums) { return Dots::to_floats(sums); }
  static Vec join(const Vec (&p)[kPack]) { return Dots::join(p); }
};

// V in float32, and P too: what 16 bits hold is kept.
struct WideValues {
  static constexpr bool kQuantized = false;
  static constexpr int kPack = 1;
  static constexpr float kMost = 1;
  struct Terms {
    using Sums = Vec;
    static Sums zero() { return Simd::set1(0); }
    static Sums load(const float* sums) { return Simd::load(sums); }
    static Sums add(Vec value, Vec p, Sums sums) { return Simd::fma(value, p, sums); }
  };
  static Vec to_floats(Vec sums) { return sums; }
  static Vec join(const Vec (&p)[kPack]) { return p[0]; }
};

// What Exp2Short takes to 255 or 127, so that the largest of P is exactly its number.
constexpr float kLog2ProbabilityMost = Dots::kProbabilityMost == 255 ? 7.9944591F : 6.9887729F;

// Logits: sums that begin with what takes off K's offset, times each key's scale.
struct LogitProduct {
  using Terms = Dots::Logits;
  static constexpr bool kKeepsSums = false;
  const float* lanes;  // Q
  std::int64_t units;
  const float* first_sums;
  const float* scales;  // of the keys

  template <int N>
  void finish(const Dots::Sums (&sums)[N], int row, int /*lane*/, float* at) const {
    const Vec scale = Simd::set1(scales[row]);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) Simd::store(at + v * Simd::kWidth, Simd::mul(Dots::to_floats(sums[v]), scale));
  }
};

// Oᵀ · rescale + sums · weight · each channel's scale.
template <class Values>
struct ValueProduct {
  using Terms = typename Values::Terms;
  static constexpr const float* first_sums = nullptr;
  static constexpr bool kKeepsSums = false;
  const float* lanes;  // P
  std::int64_t units;
  const float* rescale;
  const float* weight;
  const float* scales;  // of the channels, where V is quantized

  template <int N>
  void finish(const typename Terms::Sums (&sums)[N], int row, int lane, float* at) const {
    const Vec scale = Simd::set1(Values::kQuantized ? scales[row] : 1);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v, lane += Simd::kWidth, at += Simd::kWidth) {
      const Vec w = Simd::load(weight + lane);
      const Vec by = Values::kQuantized ? Simd::mul(w, scale) : w;
      const Vec before = Simd::mul(Simd::load(at), Simd::load(rescale + lane));
      Simd::store(at, Simd::fma(Values::to_floats(sums[v]), by, before));
    }
  }
};

template <class Values>
double value_rate() {
  constexpr float zeros[kLanes > kRateRows ? kLanes : kRateRows] = {};
  const ValueProduct<Values> product{.lanes = nullptr, .units = 0, .rescale = zeros, .weight = zeros, .scales = zeros};
  return product_rate(product, Values::kPack);
}

}  // namespace
}  // namespace ditattn::kernels::cpu
