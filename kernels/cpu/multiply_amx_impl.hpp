/// The micro-kernel on Intel's AMX: squares of 16 rows by 16 units of 4 bytes, multiplied one by another. Included
/// after simd_avx512.hpp and matrix_amx.hpp, instead of multiply_impl.hpp, which says what it is.
///
/// K's rows are a square's rows and a panel's lanes its columns, as panels lie anyway. Two squares of rows by two of
/// lanes at a time take four of the eight registers for sums and load each square of `a` and b once for two products:
/// loads then take half the time of the products.

#include <cstdint>

#include "kernels/cpu/tile_elements_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

constexpr int kStripRows = 16;
constexpr int kUnitStep = 16;
constexpr int kStripColumns = 16;
constexpr int kSquare = 16 * 16;

// A strip is one square after the other, each row by row.
constexpr std::int64_t strip_floats(std::int64_t columns) {
  return (columns + kUnitStep - 1) / kUnitStep * kUnitStep * kStripRows;
}

void rows_to_strip(const float* rows, std::int64_t pitch, std::int64_t count, float* strip) {
  for (std::int64_t x = 0; x < count; x += kUnitStep, strip += kSquare) {
    for (int i = 0; i < kStripRows; ++i) Simd::store(strip + i * kUnitStep, Simd::load(rows + i * pitch + x));
  }
}

void columns_to_strips(const float* columns, std::int64_t pitch, std::int64_t column, std::int64_t count,
                       std::int64_t strip, float* a) {
  a += column * kStripRows;
  for (std::int64_t first = 0; first < count; first += kStripRows, a += strip) {
    Vec square[kStripRows];
    for (int i = 0; i < kStripRows; ++i) square[i] = Simd::load(columns + i * pitch + first);
    Simd::transpose(square);
    for (int i = 0; i < kStripRows; ++i) Simd::store(a + i * kUnitStep, square[i]);
  }
}

// R squares of rows, of which `rows` count, for the 32 lanes from `lane` on.
template <int R, class Product>
void multiply_squares(const Product& product, const float* a, std::int64_t strip, int first, int rows, int lane,
                      float* c) {
  using Terms = typename Product::Terms;
  using Registers = MatrixRegisters;
  constexpr std::int64_t panel_stride = kLanes * sizeof(float);
  if (product.first_sums == nullptr) {
    Registers::zero<0>();
    Registers::zero<1>();
    if constexpr (R == 2) Registers::zero<2>();
    if constexpr (R == 2) Registers::zero<3>();
  } else {  // the same row 16 times
    const float* sums = product.first_sums + lane;
    Registers::load<0>(sums, 0);
    Registers::load<1>(sums + 16, 0);
    if constexpr (R == 2) Registers::load<2>(sums, 0);
    if constexpr (R == 2) Registers::load<3>(sums + 16, 0);
  }
  const float* b = product.lanes + lane;
  for (std::int64_t k = 0; k < product.units; k += kUnitStep, a += kSquare, b += kUnitStep * kLanes) {
    Registers::load<4>(a, 64);
    Registers::load<6>(b, panel_stride);
    Terms::template add<0, 4, 6>();
    Registers::load<7>(b + 16, panel_stride);
    Terms::template add<1, 4, 7>();
    if constexpr (R == 2) {
      Registers::load<5>(a + strip, 64);
      Terms::template add<2, 5, 6>();
      Terms::template add<3, 5, 7>();
    }
  }
  if constexpr (Product::kKeepsSums) {  // rows past the last are room that c has
    float* at = c + lane;
    Registers::store<0>(at, panel_stride);
    Registers::store<1>(at + 16, panel_stride);
    if constexpr (R == 2) Registers::store<2>(at + 16 * kLanes, panel_stride);
    if constexpr (R == 2) Registers::store<3>(at + 16 * kLanes + 16, panel_stride);
    return;
  }
  alignas(64) float stored[R * 16][32];
  Registers::store<0>(stored[0], sizeof(stored[0]));
  Registers::store<1>(stored[0] + 16, sizeof(stored[0]));
  if constexpr (R == 2) Registers::store<2>(stored[16], sizeof(stored[0]));
  if constexpr (R == 2) Registers::store<3>(stored[16] + 16, sizeof(stored[0]));
  for (int m = 0; m < R * 16 && m < rows; ++m) {
    const typename Terms::Sums sums[2] = {Terms::load(stored[m]), Terms::load(stored[m] + 16)};
    product.finish(sums, first + m, lane, c + m * kLanes + lane);
  }
}

template <class Product>
void multiply(const Product& product, const float* a, std::int64_t strip, float* c, int rows) {
  int row = 0;
  for (; rows - row > 16; row += 32, a += 2 * strip, c += 32 * kLanes) {
    for (int lane = 0; lane < kLanes; lane += 32) multiply_squares<2>(product, a, strip, row, rows - row, lane, c);
  }
  for (int lane = 0; lane < kLanes && row < rows; lane += 32) {
    multiply_squares<1>(product, a, strip, row, rows - row, lane, c);
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu
