#pragma once

/// AMX: Sapphire Rapids (2023) and later. Eight registers of 16 rows of 64 bytes, and products of two of them.
///
/// Written as instructions: GCC 12's intrinsics take the register's number as a macro's text and do not say that a load
/// reads memory.

#include <cstdint>

namespace ditattn::kernels::cpu {
namespace {

/// A thread's matrix registers, all in full size while an object lives.
struct MatrixRegisters {
  MatrixRegisters() {
    struct alignas(64) {
      std::uint8_t palette = 1;
      std::uint8_t start_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~MatrixRegisters() { asm volatile("tilerelease"); }
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;

  template <int r>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(r));
  }
  /// 16 rows of 64 bytes, `stride` bytes apart.
  template <int r>
  static void load(const float* rows, std::int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(r), "r"(rows), "r"(stride) : "memory");
  }
  template <int r>
  static void store(float* rows, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(r), "r"(rows), "r"(stride) : "memory");
  }
  /// sums += a · b: pairs of bfloat16, float32 sums; subnormal numbers count as zero.
  template <int sums, int a, int b>
  static void add_bf16_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
  }
  /// a's bytes unsigned, b's signed; 32-bit sums.
  template <int sums, int a, int b>
  static void add_unsigned_signed_products() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
  }
  template <int sums, int a, int b>
  static void add_signed_unsigned_products() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
