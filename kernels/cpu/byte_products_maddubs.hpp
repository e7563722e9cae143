#pragma once

/// Products of bytes by `pmaddubsw`, whose 16-bit sums of two saturate: the unsigned side has 7 bits.

namespace ditattn::kernels::cpu {
namespace {

struct ByteProducts {
  static constexpr int kUnsignedMost = 127;
  static Simd::Ints add(Vec of_unsigned, Vec of_signed, Simd::Ints sums) {
    return Simd::add_byte_products(of_unsigned, of_signed, sums);
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
