#pragma once

/// Pairs of bfloat16 for `vdpbf16ps`.

#include "kernels/cpu/bf16_pairs.hpp"

namespace ditattn::kernels::cpu {
namespace {

struct Operands : Bf16Pairs {
  static Vec add(Vec a, Vec b, Vec sums) {
    return _mm512_dpbf16_ps(sums, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
