#pragma once

/// Where numbers of NVFP4 are for tcgen05.mma of kind mxf4nvf4 with scales of 16 numbers (compute capability 10.0
/// and 10.3; PTX ISA 8.7, "tcgen05: Shared memory descriptor", "Instruction descriptor" and "Block scaling"): tiles in
/// shared memory, how descriptors tell of them, and columns of tensor memory. Images of Q, K and V are those of
/// kernels/sage3_fp4_layout.hpp: K's rows, and so the first product's columns, are in the order of `fp4::key_at`.
///
/// Both operands have the reduction contiguous and no swizzle: a row is cut into pieces of 16 bytes, and the first
/// pieces of all rows come before the second ones. Eight rows' pieces are then the 128 bytes that the unit reads at
/// once, and threads that write a row each do not meet in a bank.

#include <cstdint>

namespace ditattn::kernels::tcgen05 {

inline constexpr int kRows = 128;        ///< of the first operand: a sum's row is its lane of tensor memory
inline constexpr int kStep = 64;         ///< numbers of the reduction in a product
inline constexpr int kPiece = 16;        ///< bytes: 32 numbers
inline constexpr int kEightRows = 128;   ///< bytes from eight rows' pieces to the next eight's
inline constexpr int kScaleBytes = 512;  ///< of a step's scales, four of each of 128 rows
inline constexpr int kScaleColumns = 4;  ///< of tensor memory for these

/// An operand's tile in shared memory, at a multiple of 16 bytes.
template <int kTileRows, int kBytes>
struct OperandTile {
  static constexpr int kRows = kTileRows;
  static constexpr int kRowBytes = kBytes;
  static constexpr int kPieces = kRowBytes / kPiece;
  static constexpr int kSteps = kRowBytes * 2 / kStep;
  /// Bytes from one piece of a row to the next: eight successive pieces of rows are in different banks, too.
  static constexpr int kStride = kRows * kPiece + 128 / kPieces;
  static constexpr int kTileBytes = kPieces * kStride;
  static constexpr int kGroupBytes = kSteps * kScaleBytes;  ///< of its scales, at `scale_at`
  static constexpr int at(int row, int piece) { return piece * kStride + row * kPiece; }
  static constexpr int step_at(int step) { return at(0, step * (kStep / 2 / kPiece)); }
};

/// A matrix in shared memory at `address`; `piece_stride` is from one piece of a row to the next, unused for scales,
/// whose rows are one piece. Fields are in units of 16 bytes; bit 46 is a constant of this generation.
constexpr std::uint64_t describe(unsigned address, int piece_stride) {
  const auto units = [](unsigned bytes) { return static_cast<std::uint64_t>((bytes & 0x3FFFF) / 16); };
  return units(address) | units(static_cast<unsigned>(piece_stride)) << 16 | units(kEightRows) << 32 |
         std::uint64_t{1} << 46;
}

/// A product of 128 rows and `columns` (a multiple of 16, 256 at most) columns of e2m1 with scales of e4m3, float32
/// sums: types (1 is e2m1) at bits 7 and 10, columns / 8 at 17, rows / 128 at 27.
constexpr std::uint32_t instruction(int columns) {
  return 1U << 7 | 1U << 10 | static_cast<std::uint32_t>(columns / 8) << 17 | std::uint32_t{kRows / 128} << 27;
}

/// Where the four scales of a row (of either operand) and step are: bytes. The unit's copy of a step's 512 bytes has 16
/// bytes for a lane, which are four columns: the scales of rows 0 to 31, 32 to 63 and so on.
constexpr int scale_at(int row, int step) { return step * kScaleBytes + row % 32 * 16 + row / 32 * 4; }

/// Columns of tensor memory: sums, of the first product and, once they are read, of the second; the operands' scales.
enum class Operand : std::uint8_t { query, key, probability, value };
inline constexpr int kMostSteps = 2;
inline constexpr int kSumColumns = 128;
inline constexpr int kColumns = 256;  ///< that are allocated, a power of two: two blocks of threads have room beside
                                      ///< each other
constexpr int scale_column(Operand operand, int step) {
  return kSumColumns + kScaleColumns * (kMostSteps * static_cast<int>(operand) + step);
}

/// An address of tensor memory.
constexpr std::uint32_t at_lane(std::uint32_t address, int lane) {
  return address + (static_cast<std::uint32_t>(lane) << 16);
}

}  // namespace ditattn::kernels::tcgen05
