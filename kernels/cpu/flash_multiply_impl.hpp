/// The micro-kernel: a block of a product, queries along the lanes. Included after tile_rows_impl.hpp.

#include <cstdint>

#include "kernels/cpu/ticks.hpp"

namespace ditattn::kernels::cpu {
namespace {

// c[m][lane] = c[m][lane] · rescale[lane] + Σ_k a[m · a_row + k · a_column] · b[k][lane] for M rows m and the lanes of
// a panel; without `rescale`, c starts from zero. Elements of a and b are the operands' units.
template <int M>
void multiply_rows(const float* a, std::int64_t a_row, std::int64_t a_column, const float* b, const float* rescale,
                   float* c, std::int64_t depth) {
  Vec sums[M][Simd::kVectors];
#pragma GCC unroll 16
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
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec x = Simd::set1(a[m * a_row + k * a_column]);
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = Operands::multiply_add(x, row[v], sums[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) Simd::store(c + m * kLanes + v * Simd::kWidth, sums[m][v]);
  }
}

// All `rows` of c, in groups of kMaxRows and the rest.
void multiply(const float* a, std::int64_t a_row, std::int64_t a_column, const float* b, const float* rescale, float* c,
              std::int64_t rows, std::int64_t depth) {
  std::int64_t m = 0;
  const auto take = [&]<int M>() {
    for (; m + M <= rows; m += M) multiply_rows<M>(a + m * a_row, a_row, a_column, b, rescale, c + m * kLanes, depth);
  };
  take.template operator()<Simd::kMaxRows>();
  if (Simd::kMaxRows > 6) take.template operator()<6>();
  a += m * a_row;
  c += m * kLanes;
  switch (rows - m) {
    case 5:
      return multiply_rows<5>(a, a_row, a_column, b, rescale, c, depth);
    case 4:
      return multiply_rows<4>(a, a_row, a_column, b, rescale, c, depth);
    case 3:
      return multiply_rows<3>(a, a_row, a_column, b, rescale, c, depth);
    case 2:
      return multiply_rows<2>(a, a_row, a_column, b, rescale, c, depth);
    case 1:
      return multiply_rows<1>(a, a_row, a_column, b, rescale, c, depth);
    default:
      return;
  }
}

// Multiply-adds of one element per tick, on data in the first cache: the best of a few runs of some ten thousand
// cycles, which an interrupt rarely meets all. For ratios between units of one CPU.
double multiply_rate() {
  constexpr int depth = 64;
  alignas(64) float a[Simd::kMaxRows * depth] = {};
  alignas(64) float b[depth * kLanes] = {};
  alignas(64) float c[Simd::kMaxRows * kLanes] = {};
  double best = 0;
  for (int run = 0; run < 12; ++run) {
    constexpr int calls = 16;
    const auto start = static_cast<double>(read_ticks());
    for (int call = 0; call < calls; ++call) multiply_rows<Simd::kMaxRows>(a, depth, 1, b, nullptr, c, depth);
    asm volatile("" : : "r"(c) : "memory");
    const double ticks = static_cast<double>(read_ticks()) - start;
    const double rate = double{Simd::kMaxRows} * kLanes * depth * Operands::kPack * calls / ticks;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace
}  // namespace ditattn::kernels::cpu
