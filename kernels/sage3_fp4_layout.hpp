#pragma once

/// Where numbers of NVFP4 are for mma.sync…m16n8k64 of kind mxf4nvf4 with block scales (PTX ISA 8.7, "Matrix fragments
/// for mma.m16n8k64" and "Block scaling"): in images of Q, K and V, which are also their tiles in shared memory, and
/// in threads' registers. Codes of e2m1 are two to a byte, the first in the low half; four scales of e4m3 are a word.
///
/// Both products have the reduction contiguous: Q and K by channel, P and V by key. A thread has, of the first
/// product's sums, keys that are a run of the second's operand: so K's columns are in an order of their own.

namespace ditattn::kernels::fp4 {

inline constexpr int kStep = 64;          ///< numbers of the reduction in a product
inline constexpr int kStepBytes = 32;     ///< of a row
inline constexpr int kBlockKeys = 128;    ///< two steps of P · V
inline constexpr int kRegisterCodes = 8;  ///< successive numbers of a row
inline constexpr int kGroup = 16;         ///< numbers of a scale

/// Bytes from one row of shared memory to the next: the rows of eight threads begin in different banks.
constexpr int pitch(int row_bytes) { return row_bytes + 16; }

/// The key of a block that is column `column` of K's product. Thread t of four has columns 8 · j + 2 · t + c, for j =
/// 8 · s + 4 · h + q: of step s of P · V, register pair h, its numbers 2 · q + c.
constexpr int key_at(int column) {
  const int j = column / 8;
  return kStep * (j / 8) + 32 * (j % 8 / 4) + kRegisterCodes * (column % 8 / 2) + 2 * (j % 4) + column % 2;
}
/// The inverse.
constexpr int column_of(int key) {
  const int j = 8 * (key / kStep) + 4 * (key % kStep / 32) + key % kRegisterCodes / 2;
  return 8 * j + 2 * (key % 32 / kRegisterCodes) + key % 2;
}

/// A code's byte in its row, and how far it is shifted.
constexpr int byte_of(int number) { return number / 2; }
constexpr int shift_of(int number) { return number % 2 * 4; }

/// The address, in a tile of rows `row_pitch` apart, that lane `lane` gives to ldmatrix.x4 for the first operand's 16
/// rows: its four registers are then those of a step of `multiply`.
constexpr int first_operand_at(int lane, int step, int row_pitch) {
  return lane % 16 * row_pitch + step * kStepBytes + lane / 16 * 16;
}
/// The same for the second operand's 16 columns from `column` on: two registers of the first eight, two of the others.
constexpr int second_operand_at(int lane, int column, int step, int row_pitch) {
  return (column + lane / 16 * 8 + lane % 8) * row_pitch + step * kStepBytes + lane / 8 % 2 * 16;
}

/// Which row's scales, of which step, a lane holds for the first operand: two threads of four have a step's, one of
/// row lane / 4, one of that plus 8. The product of step s is told that pair s has them.
constexpr int scale_row_of(int lane) { return lane / 4 + lane % 2 * 8; }
constexpr int scale_step_of(int lane) { return lane % 4 / 2; }

/// Which column's scales a lane holds for the second operand, of each 32 columns: the product of the q-th eight is told
/// that thread q of four has them.
constexpr int scale_column_of(int lane) { return lane % 4 * 8 + lane / 4; }

/// P as threads have it: number `i` of register pair `half` of step `step` is this key of the block, for both rows.
constexpr int probability_key(int lane, int step, int half, int i) {
  return kStep * step + 32 * half + kRegisterCodes * (lane % 4) + i;
}
/// The sum of K's product that it is made of: 4 · j + 2 · row + c, for rows lane / 4 (0) and 8 below (1).
constexpr int probability_sum(int row, int step, int half, int i) {
  return 4 * (8 * step + 4 * half + i / 2) + 2 * row + i % 2;
}
/// Threads t and t ^ 1 have the numbers of a group: the one of step `step` and pair `half` is byte 2 · half + t / 2 of
/// the row's word.
constexpr int probability_scale_byte(int lane, int half) { return 2 * half + lane % 4 / 2; }

}  // namespace ditattn::kernels::fp4
