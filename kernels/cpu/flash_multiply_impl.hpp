/// The micro-kernel: a block of a product, queries along the lanes. Included after tile_rows_impl.hpp.

#include <cstdint>

#include "kernels/cpu/rate.hpp"

namespace ditattn::kernels::cpu {
namespace {

// c[m][lane] = c[m][lane] · rescale[lane] + Σ_k a[k · kMaxRows + m] · b[k][lane] for M rows m and the lanes of a panel;
// without `rescale`, c starts from zero. Elements of a and b are the operands' units.
template <int M>
void multiply_rows(const float* a, const float* b, const float* rescale, float* c, std::int64_t depth) {
  Vec sums[M][Simd::kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) {
      float* at = c + m * kLanes + v * Simd::kWidth;
      sums[m][v] =
          rescale == nullptr ? Simd::set1(0) : Simd::mul(Simd::load(at), Simd::load(rescale + v * Simd::kWidth));
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec row[Simd::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) row[v] = Simd::load(b + k * kLanes + v * Simd::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = Simd::set1(a[k * Simd::kMaxRows + m]);
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = Operands::multiply_add(x, row[v], sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) Simd::store(c + m * kLanes + v * Simd::kWidth, sums[m][v]);
  }
}

// All `rows` of c from a's strips, which are `strip` apart.
void multiply(const float* a, std::int64_t strip, const float* b, const float* rescale, float* c, std::int64_t rows,
              std::int64_t depth) {
  static_assert(Simd::kMaxRows == 6);
  for (; rows >= 6; rows -= 6, a += strip, c += 6 * kLanes) multiply_rows<6>(a, b, rescale, c, depth);
  switch (rows) {
    case 5:
      return multiply_rows<5>(a, b, rescale, c, depth);
    case 4:
      return multiply_rows<4>(a, b, rescale, c, depth);
    case 3:
      return multiply_rows<3>(a, b, rescale, c, depth);
    case 2:
      return multiply_rows<2>(a, b, rescale, c, depth);
    case 1:
      return multiply_rows<1>(a, b, rescale, c, depth);
    default:
      return;
  }
}

double multiply_rate() {
  constexpr int depth = 64;
  alignas(64) float a[Simd::kMaxRows * depth] = {};
  alignas(64) float b[depth * kLanes] = {};
  alignas(64) float c[Simd::kMaxRows * kLanes] = {};
  return best_rate(Simd::kMaxRows * kLanes * depth * Operands::kPack, c,
                   [&] { multiply_rows<Simd::kMaxRows>(a, b, nullptr, c, depth); });
}

}  // namespace
}  // namespace ditattn::kernels::cpu
