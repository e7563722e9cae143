#pragma once

/// What tcgen05.mma of kind mxf4nvf4 with scales of 16 numbers, and the copy of scales, do, as PTX ISA 8.7 has it: what
/// descriptors' bits mean, and where shared and tensor memory are read. For the host, and for the device (with nvcc's
/// --expt-relaxed-constexpr). Written from the document: kernels/sage3_tcgen05_layout.hpp is what it checks.

#include <cstdint>

#include "kernels/nvfp4.hpp"

namespace ditattn::kernels::emulated {

constexpr unsigned bits_of(std::uint64_t word, int first, int count) {
  return static_cast<unsigned>(word >> first) & ((1U << count) - 1);
}

/// "Shared memory descriptor", of a matrix with K contiguous that is not swizzled: core matrices of eight rows of 16
/// bytes are contiguous.
struct SharedMatrix {
  unsigned start;
  unsigned leading;  ///< from a core matrix to the next along K
  unsigned stride;   ///< to the one eight rows below
  bool is_valid;

  constexpr explicit SharedMatrix(std::uint64_t descriptor)
      : start(bits_of(descriptor, 0, 14) * 16),
        leading(bits_of(descriptor, 16, 14) * 16),
        stride(bits_of(descriptor, 32, 14) * 16),
        is_valid(bits_of(descriptor, 14, 2) == 0 && bits_of(descriptor, 30, 2) == 0 &&
                 bits_of(descriptor, 46, 3) == 1 &&  // a constant
                 bits_of(descriptor, 49, 3) == 0 &&  // base offset
                 bits_of(descriptor, 52, 1) == 0 &&  // leading: an offset, not an address
                 bits_of(descriptor, 53, 8) == 0 && bits_of(descriptor, 61, 3) == 0) {}  // no swizzle
  [[nodiscard]] constexpr unsigned at(int row, int byte) const {
    return start + static_cast<unsigned>(byte / 16) * leading + static_cast<unsigned>(row / 8) * stride +
           static_cast<unsigned>(row % 8 * 16 + byte % 16);
  }
};

/// "Instruction descriptor" for kinds mxf4 and mxf4nvf4.
struct Instruction {
  int rows;
  int columns;
  bool is_valid;

  constexpr explicit Instruction(std::uint32_t bits)
      : rows(static_cast<int>(bits_of(bits, 27, 2)) * 128),
        columns(static_cast<int>(bits_of(bits, 17, 6)) * 8),
        is_valid(bits_of(bits, 0, 4) == 0 &&                                // not sparse
                 bits_of(bits, 4, 3) == 0 &&                                // which byte B's scales begin with
                 bits_of(bits, 7, 3) == 1 && bits_of(bits, 10, 2) == 1 &&   // e2m1
                 bits_of(bits, 12, 5) == 0 &&                               // nothing negated or transposed
                 bits_of(bits, 23, 1) == 0 &&                               // ue4m3
                 bits_of(bits, 24, 3) == 0 && bits_of(bits, 29, 2) == 0 &&  // which byte A's begin with
                 bits_of(bits, 31, 1) == 0 &&                               // 64 numbers
                 rows == 128 && columns % 16 == 0 && columns > 0 && columns <= 256) {}
};

constexpr int lane_of(std::uint32_t address) { return static_cast<int>(address >> 16); }
constexpr int column_of(std::uint32_t address) { return static_cast<int>(address & 0xFFFF); }

/// tcgen05.cp.32x128b.warpx4: 32 rows of 16 bytes to as many lanes, in four columns, and to the lanes 32, 64 and 96
/// further. `shared.byte(address)`, `tensor.word(lane, column)`.
template <class Shared, class Tensor>
constexpr void copy_scales(const Shared& shared, Tensor&& tensor, std::uint32_t to, std::uint64_t descriptor, int row) {
  const SharedMatrix from(descriptor);
  for (int i = 0; i < 4; ++i) {
    std::uint32_t word = 0;
    for (int byte = 0; byte < 4; ++byte) word |= std::uint32_t{shared.byte(from.at(row, 4 * i + byte))} << 8 * byte;
    for (int quarter = 0; quarter < 4; ++quarter) {
      tensor.word(lane_of(to) + 32 * quarter + row, column_of(to) + i) = word;
    }
  }
}

/// A sum of tcgen05.mma…block_scale.scale_vec::4X of 128 rows: that of row `row` is in this lane, and column `column`
/// of the sums. Scales of A's row r and of B's column r are the four bytes of lane r % 32 (of each 32 lanes) in column
/// r / 32 of those that are given.
template <class Sum, class Shared, class Tensor>
constexpr Sum product(const Shared& shared, const Tensor& tensor, std::uint64_t a, std::uint64_t b,
                      std::uint32_t a_scales, std::uint32_t b_scales, int row, int column) {
  const SharedMatrix rows(a);
  const SharedMatrix columns(b);
  const int quarter = row / 32 * 32;
  const std::uint32_t of_row = tensor.word(quarter + row % 32, column_of(a_scales) + row / 32);
  const std::uint32_t of_column = tensor.word(quarter + column % 32, column_of(b_scales) + column / 32);
  Sum sum = 0;
  for (int group = 0; group < 4; ++group) {
    Sum products = 0;
    for (int k = 16 * group; k < 16 * group + 16; ++k) {
      const unsigned x = shared.byte(rows.at(row, k / 2)) >> 4 * (k % 2) & 15U;
      const unsigned y = shared.byte(columns.at(column, k / 2)) >> 4 * (k % 2) & 15U;
      products += static_cast<Sum>(E2m1::decode(x)) * E2m1::decode(y);
    }
    sum += products * static_cast<Sum>(E4m3::decode(of_row >> 8 * group & 255)) *
           E4m3::decode(of_column >> 8 * group & 255);
  }
  return sum;
}

}  // namespace ditattn::kernels::emulated
