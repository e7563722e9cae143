#pragma once

/// Products of bytes by `vpdpbusd`: four at a time, with 32-bit sums.

namespace ditattn::kernels::cpu {
namespace {

struct ByteProducts {
  static constexpr int kUnsignedMost = 255;
  static Simd::Ints add(Vec of_unsigned, Vec of_signed, Simd::Ints sums) {
    // Not _mm512_dpbusd_epi32: GCC 12 thinks that it touches memory and stores all sums at each step: half the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(of_unsigned), "v"(of_signed));
    return sums;
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
