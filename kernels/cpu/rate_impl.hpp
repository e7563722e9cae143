/// How fast a micro-kernel is, to compare units of one CPU. Included after a multiply_*_impl.hpp.

#include "kernels/cpu/ticks.hpp"

namespace ditattn::kernels::cpu {
namespace {

constexpr int kRateRows = 2 * kStripRows;

// Multiply-adds of one element per tick for a product of units of `pack` elements, on data in the first cache: the best
// of a few runs of some ten thousand cycles, which an interrupt rarely meets all.
template <class Product>
double product_rate(Product product, int pack) {
  constexpr int rows = kRateRows;
  constexpr int depth = 64;
  alignas(64) float a[rows * depth] = {};
  alignas(64) float lanes[depth * kLanes] = {};
  alignas(64) float c[rows * kLanes] = {};
  product.lanes = lanes;
  product.units = depth;
  [[maybe_unused]] const MatrixRegisters registers;
  double best = 0;
  for (int run = 0; run < 12; ++run) {
    constexpr int calls = 8;
    const auto start = static_cast<double>(read_ticks());
    for (int i = 0; i < calls; ++i) {
      multiply(product, a, strip_floats(depth), c, rows);
      asm volatile("" : : "r"(c) : "memory");
    }
    const double rate =
        static_cast<double>(rows) * kLanes * depth * pack * calls / (static_cast<double>(read_ticks()) - start);
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace
}  // namespace ditattn::kernels::cpu
