#pragma once

/// Products of bytes by `vpdpbusd`: four at a time, with 32-bit sums.

namespace ditattn::kernels::cpu {
namespace {

struct ByteProducts {
  static constexpr int kUnsignedMost = 255;
  static Simd::Ints add(Vec of_unsigned, Vec of_signed, Simd::Ints sums) {
    return _mm512_dpbusd_epi32(sums, _mm512_castps_si512(of_unsigned), _mm512_castps_si512(of_signed));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
