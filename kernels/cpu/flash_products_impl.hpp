/// The two products of attention, for the micro-kernel. Included after tile_softmax_impl.hpp.

#include "kernels/cpu/rate_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

// Sᵀ = K · Qᵀ.
struct LogitProduct {
  using Terms = Operands;
  static constexpr const float* first_sums = nullptr;
  static constexpr bool kKeepsSums = true;  // c is the sums
  const float* lanes;                       // Q
  std::int64_t units;

  template <int N>
  void finish(const Vec (&sums)[N], int /*row*/, int /*lane*/, float* at) const {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) Simd::store(at + v * Simd::kWidth, sums[v]);
  }
};

// Oᵀ = Oᵀ · rescale + Vᵀ · Pᵀ.
struct ValueProduct {
  using Terms = Operands;
  static constexpr const float* first_sums = nullptr;
  static constexpr bool kKeepsSums = false;
  const float* lanes;  // P
  std::int64_t units;
  const float* rescale;

  template <int N>
  void finish(const Vec (&sums)[N], int /*row*/, int lane, float* at) const {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v, at += Simd::kWidth) {
      Simd::store(at, Simd::fma(Simd::load(at), Simd::load(rescale + lane + v * Simd::kWidth), sums[v]));
    }
  }
};

double multiply_rate() { return product_rate(LogitProduct{}, Operands::kPack); }

}  // namespace
}  // namespace ditattn::kernels::cpu
