/// The two products of quantized attention, each with what makes numbers of its sums. Included after
/// flash_multiply_impl.hpp and a `Dots`.

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

// sums[m] += Σ_k a[k · kMaxRows + m] · b[k] for M rows of a strip and the lanes of a panel, in units.
template <int M, class Sums, class Add>
[[gnu::always_inline]] inline void accumulate(const float* a, const float* b, std::int64_t depth,
                                              Sums (&sums)[M][Simd::kVectors], Add add) {
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec row[Simd::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) row[v] = Simd::load(b + k * kLanes + v * Simd::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = Simd::set1(a[k * Simd::kMaxRows + m]);
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = add(x, row[v], sums[m][v]);
    }
  }
}

// Logits of M keys: the sums, which begin at `start` per lane, times each key's scale.
struct LogitRows {
  const float* query;
  const float* start;
  std::int64_t units;

  template <int M>
  void run(const float* key, const float* key_scale, float* logits) const {
    Dots::Sums sums[M][Simd::kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = Dots::start(start + v * Simd::kWidth);
    }
    accumulate<M>(key, query, units, sums, [](Vec a, Vec b, Dots::Sums s) { return Dots::add_logits(a, b, s); });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec scale = Simd::set1(key_scale[m]);
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) {
        Simd::store(logits + m * kLanes + v * Simd::kWidth, Simd::mul(Dots::to_floats(sums[m][v]), scale));
      }
    }
  }
};

// M rows of Oᵀ: out · rescale + the sums · weight · each channel's scale.
template <class Values>
struct ValueRows {
  const float* p;
  const float* rescale;
  const float* weight;
  std::int64_t units;

  template <int M>
  void run(const float* value, const float* value_scale, float* out) const {
    typename Values::Sums sums[M][Simd::kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = Values::zero();
    }
    accumulate<M>(value, p, units, sums, [](Vec a, Vec b, auto s) { return Values::add(a, b, s); });
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) {
      const Vec shrink = Simd::load(rescale + v * Simd::kWidth);
      const Vec w = Simd::load(weight + v * Simd::kWidth);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        float* at = out + m * kLanes + v * Simd::kWidth;
        const Vec scale = Values::kQuantized ? Simd::mul(w, Simd::set1(value_scale[m])) : w;
        Simd::store(at, Simd::fma(Values::to_floats(sums[m][v]), scale, Simd::mul(Simd::load(at), shrink)));
      }
    }
  }
};

// `body` over all rows: strips of `a` with their scales and rows of c.
template <class Body>
void over_strips(const Body& body, const float* a, std::int64_t strip, const float* scales, float* c,
                 std::int64_t rows) {
  static_assert(Simd::kMaxRows == 6);
  for (; rows >= 6; rows -= 6, a += strip, scales += 6, c += 6 * kLanes) body.template run<6>(a, scales, c);
  switch (rows) {
    case 5:
      return body.template run<5>(a, scales, c);
    case 4:
      return body.template run<4>(a, scales, c);
    case 3:
      return body.template run<3>(a, scales, c);
    case 2:
      return body.template run<2>(a, scales, c);
    case 1:
      return body.template run<1>(a, scales, c);
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
  const ValueRows<Values> rows{.p = p, .rescale = lanes, .weight = lanes, .units = depth};
  return best_rate(Simd::kMaxRows * kLanes * depth * Values::kPack,
                   [&] { rows.template run<Simd::kMaxRows>(a, lanes, out); });
}

}  // namespace
}  // namespace ditattn::kernels::cpu
