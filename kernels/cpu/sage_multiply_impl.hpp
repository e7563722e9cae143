/// The two products of quantized attention, each with what makes numbers of its sums. Included after a
/// `Dots`.

#include <cstdint>

#include "kernels/cpu/rate.hpp"

namespace ditattn::kernels::cpu {
namespace {

// Quantized V: P's numbers against V's.
struct ByteValues {
  static constexpr bool kQuantized = true;
  static constexpr int kPack = Dots::kPack;
  static constexpr float kMost = Dots::kProbabilityMost;
  using Sums = Dots::Sums;
  static Sums zero() { return Dots::zero(); }
  static Sums add(Vec value, Vec p, Sums sums) { return Dots::add_values(value, p, sums); }
  static Vec to_floats(Sums sums) { return Dots::to_floats(sums); }
  static Vec join(const Vec (&p)[kPack]) { return Dots::join(p); }
};

// V in float32, and P too: what 16 bits hold is kept.
struct WideValues {
  static constexpr bool kQuantized = false;
  static constexpr int kPack = 1;
  static constexpr float kMost = 1;
  using Sums = Vec;
  static Sums zero() { return Simd::set1(0); }
  static Sums add(Vec value, Vec p, Sums sums) { return Simd::fma(value, p, sums); }
  static Vec to_floats(Sums sums) { return sums; }
  static Vec join(const Vec (&p)[kPack]) { return p[0]; }
};

constexpr float kLog2ProbabilityMost = Dots::kProbabilityMost == 255 ? 7.99435344F : 6.98868469F;

// M rows of c for a panel: what `product` makes of Σ_k a[k · kMaxRows + m] · b[k], in units, and of row m's scale.
template <int M, class Product>
void product_rows(const Product& product, const float* a, const float* scales, float* c) {
  typename Product::Sums sums[M][Simd::kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = product.start(v * Simd::kWidth);
  }
  const float* b = product.lanes;
  const std::int64_t depth = product.units;
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec row[Simd::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) row[v] = Simd::load(b + k * kLanes + v * Simd::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = Simd::set1(a[k * Simd::kMaxRows + m]);
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = Product::add(x, row[v], sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const Vec scale = Simd::set1(scales[m]);
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) {
      product.finish(sums[m][v], scale, v * Simd::kWidth, c + m * kLanes + v * Simd::kWidth);
    }
  }
}

// Logits: sums that begin with what takes off K's offset, times each key's scale.
struct LogitProduct {
  using Sums = Dots::Sums;
  const float* lanes;  // Q
  std::int64_t units;
  const float* first_sums;

  Sums start(int lane) const { return Dots::start(first_sums + lane); }
  static Sums add(Vec key, Vec query, Sums sums) { return Dots::add_logits(key, query, sums); }
  void finish(Sums sums, Vec key_scale, int /*lane*/, float* at) const {
    Simd::store(at, Simd::mul(Dots::to_floats(sums), key_scale));
  }
};

// Oᵀ · rescale + sums · weight · each channel's scale.
template <class Values>
struct ValueProduct {
  using Sums = typename Values::Sums;
  const float* lanes;  // P
  std::int64_t units;
  const float* rescale;
  const float* weight;

  Sums start(int /*lane*/) const { return Values::zero(); }
  static Sums add(Vec value, Vec p, Sums sums) { return Values::add(value, p, sums); }
  void finish(Sums sums, Vec value_scale, int lane, float* at) const {
    const Vec w = Simd::load(weight + lane);
    const Vec scale = Values::kQuantized ? Simd::mul(w, value_scale) : w;
    Simd::store(at, Simd::fma(Values::to_floats(sums), scale, Simd::mul(Simd::load(at), Simd::load(rescale + lane))));
  }
};

// All `rows` of c, from strips of `a` and their scales.
template <class Product>
void multiply_strips(const Product& product, const float* a, std::int64_t strip, const float* scales, float* c,
                     std::int64_t rows) {
  static_assert(Simd::kMaxRows == 6);
  for (; rows >= 6; rows -= 6, a += strip, scales += 6, c += 6 * kLanes) product_rows<6>(product, a, scales, c);
  switch (rows) {
    case 5:
      return product_rows<5>(product, a, scales, c);
    case 4:
      return product_rows<4>(product, a, scales, c);
    case 3:
      return product_rows<3>(product, a, scales, c);
    case 2:
      return product_rows<2>(product, a, scales, c);
    case 1:
      return product_rows<1>(product, a, scales, c);
    default:
      return;
  }
}

template <class Values>
double value_rate() {
  constexpr int depth = 64;
  alignas(64) float a[Simd::kMaxRows * depth] = {};
  alignas(64) float p[depth * kLanes] = {};
  alignas(64) float lanes[kLanes] = {};
  alignas(64) float out[Simd::kMaxRows * kLanes] = {};
  const ValueProduct<Values> product{.lanes = p, .units = depth, .rescale = lanes, .weight = lanes};
  return best_rate(Simd::kMaxRows * kLanes * depth * Values::kPack, out,
                   [&] { product_rows<Simd::kMaxRows>(product, a, lanes, out); });
}

}  // namespace
}  // namespace ditattn::kernels::cpu
