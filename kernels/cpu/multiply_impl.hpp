/// The micro-kernel: a block of a product, queries along the vector lanes. Included after a simd_*.hpp, instead of
/// multiply_amx_impl.hpp.
///
/// Both compute c[row] = finish(start + Σ_k a[row][k] · b[k]) for the rows of `a` and one panel, where a `Product` says
/// what b is and what is made of the sums, and its `Terms` what one step adds. Elements of a and b are units of 4
/// bytes. They share the names of this file: the layout of `a` (strips), `multiply`, `product_rate`,
/// `MatrixRegisters`.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/tile_elements_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

// K and V lie in strips of kStripRows rows, column by column: what the micro-kernel reads is one stream. Rejected: row
// by row, a dozen short streams that no hardware prefetcher follows; with a packed head in the third cache this cost 5
// to 15 % of 1,4,4096,4096,128 in float32 (Zen 4).
constexpr int kStripRows = 6;
constexpr int kUnitStep = 1;      // rows of a and b are whole multiples of this many units, filled up with zeros
constexpr int kStripColumns = 1;  // columns of `a` that are stored at a time

constexpr std::int64_t strip_floats(std::int64_t columns) { return columns * kStripRows; }

// kStripRows rows of `count` columns, `pitch` apart, to a strip; writes up to kWidth columns past its end.
void rows_to_strip(const float* rows, std::int64_t pitch, std::int64_t count, float* strip) {
  constexpr int parts = (kStripRows + Simd::kWidth - 1) / Simd::kWidth;
  for (std::int64_t x = 0; x < count; x += Simd::kWidth) {
    Vec block[parts][Simd::kWidth];
    for (int part = 0; part < parts; ++part) {
      for (int i = 0; i < Simd::kWidth; ++i) block[part][i] = Simd::load(rows + (part * Simd::kWidth + i) * pitch + x);
      Simd::transpose(block[part]);
    }
    for (int i = 0; i < Simd::kWidth; ++i) {  // in order: what is written past a column is the next one's
      for (int part = 0; part < parts; ++part) {
        Simd::store(strip + (x + i) * kStripRows + part * Simd::kWidth, block[part][i]);
      }
    }
  }
}

// Columns [column, column + kStripColumns) of all strips, which are `strip` apart, from as many arrays of `count`
// values.
void columns_to_strips(const float* columns, std::int64_t /*pitch*/, std::int64_t column, std::int64_t count,
                       std::int64_t strip, float* a) {
  a += column * kStripRows;
  std::int64_t i = 0;
  for (; i + kStripRows <= count; i += kStripRows, a += strip) {
    std::memcpy(a, columns + i, kStripRows * sizeof(float));
  }
  for (int rest = 0; i < count; ++i, ++rest) a[rest] = columns[i];
}

// M rows of c, of which the first is row `first`.
template <int M, class Product>
void multiply_rows(const Product& product, const float* a, int first, float* c) {
  using Terms = typename Product::Terms;
  typename Terms::Sums sums[M][Simd::kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) {
      sums[m][v] = product.first_sums == nullptr ? Terms::zero() : Terms::load(product.first_sums + v * Simd::kWidth);
    }
  }
  const float* b = product.lanes;
  const std::int64_t depth = product.units;
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec row[Simd::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < Simd::kVectors; ++v) row[v] = Simd::load(b + k * kLanes + v * Simd::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = Simd::set1(a[k * kStripRows + m]);
#pragma GCC unroll 4
      for (int v = 0; v < Simd::kVectors; ++v) sums[m][v] = Terms::add(x, row[v], sums[m][v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) product.finish(sums[m], first + m, 0, c + m * kLanes);
}

// All `rows` of c from a's strips, which are `strip` apart.
template <class Product>
void multiply(const Product& product, const float* a, std::int64_t strip, float* c, int rows) {
  static_assert(kStripRows == 6);
  int row = 0;
  for (; rows - row >= 6; row += 6, a += strip, c += 6 * kLanes) multiply_rows<6>(product, a, row, c);
  switch (rows - row) {
    case 5:
      return multiply_rows<5>(product, a, row, c);
    case 4:
      return multiply_rows<4>(product, a, row, c);
    case 3:
      return multiply_rows<3>(product, a, row, c);
    case 2:
      return multiply_rows<2>(product, a, row, c);
    case 1:
      return multiply_rows<1>(product, a, row, c);
    default:
      return;
  }
}

// What a thread must hold while it multiplies: here, nothing.
struct MatrixRegisters {};

}  // namespace
}  // namespace ditattn::kernels::cpu
