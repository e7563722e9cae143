#pragma once

/// kernels/cpu/matrix_amx.hpp for CPUs without AMX: the same registers and products in plain code, after Intel's
/// Software Developer's Manual. Tests the kernels that use them, but for the instructions themselves.

#include <cstdint>
#include <cstring>

namespace ditattn::kernels::cpu {
namespace {

struct MatrixRegisters {
  struct Register {
    std::uint8_t rows[16][64];
  };
  inline static thread_local Register registers[8];
  inline static thread_local bool configured = false;

  MatrixRegisters() {
    configured = true;
    std::memset(registers, 0, sizeof(registers));
  }
  ~MatrixRegisters() { configured = false; }
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;

  static Register& at(int r) {
    if (!configured) __builtin_trap();  // as the CPU does
    return registers[r];
  }

  template <int r>
  static void zero() {
    at(r) = {};
  }
  template <int r>
  static void load(const float* rows, std::int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(at(r).rows[i], reinterpret_cast<const char*>(rows) + i * stride, 64);
  }
  template <int r>
  static void store(float* rows, std::int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(reinterpret_cast<char*>(rows) + i * stride, at(r).rows[i], 64);
  }

  static float bf16(const std::uint8_t* bytes) {
    std::uint16_t half = 0;
    std::memcpy(&half, bytes, 2);
    if ((half & 0x7F80) == 0) half &= 0x8000;
    const std::uint32_t word = static_cast<std::uint32_t>(half) << 16;
    return __builtin_bit_cast(float, word);
  }

  // Even and odd elements are summed apart.
  template <int sums, int a, int b>
  static void add_bf16_products() {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        float even = 0;
        float odd = 0;
        for (int k = 0; k < 16; ++k) {
          even = __builtin_fmaf(bf16(at(a).rows[m] + 4 * k), bf16(at(b).rows[k] + 4 * n), even);
          odd = __builtin_fmaf(bf16(at(a).rows[m] + 4 * k + 2), bf16(at(b).rows[k] + 4 * n + 2), odd);
        }
        float sum = 0;
        std::memcpy(&sum, at(sums).rows[m] + 4 * n, 4);
        sum += even + odd;
        std::memcpy(at(sums).rows[m] + 4 * n, &sum, 4);
      }
    }
  }
  template <int sums, int a, int b>
  static void add_unsigned_signed_products() {
    add_byte_products<std::uint8_t, std::int8_t>(at(sums), at(a), at(b));
  }
  template <int sums, int a, int b>
  static void add_signed_unsigned_products() {
    add_byte_products<std::int8_t, std::uint8_t>(at(sums), at(a), at(b));
  }
  template <class A, class B>
  static void add_byte_products(Register& sums, const Register& a, const Register& b) {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        std::int32_t sum = 0;
        std::memcpy(&sum, sums.rows[m] + 4 * n, 4);
        for (int k = 0; k < 64; ++k) {
          sum += static_cast<A>(a.rows[m][k]) * static_cast<B>(b.rows[k / 4][4 * n + k % 4]);
        }
        std::memcpy(sums.rows[m] + 4 * n, &sum, 4);
      }
    }
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
