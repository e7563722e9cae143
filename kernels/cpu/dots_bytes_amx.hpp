#pragma once

/// Products of bytes by `tdpbusd` and `tdpbsud`. Included after multiply_amx_impl.hpp.

#include "kernels/cpu/byte_numbers_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

/// As dots_float.hpp has them; the numbers are those of `vpdpbusd`, so that both levels' results agree.
struct Dots : ByteNumbers {
  static constexpr int kKeyMost = 127;
  static constexpr int kKeyOffset = 128;
  static constexpr int kProbabilityMost = 255;

  struct Logits : Terms {
    template <int sums, int key, int query>
    static void add() {
      MatrixRegisters::add_unsigned_signed_products<sums, key, query>();
    }
  };
  struct Values : Terms {
    template <int sums, int value, int p>
    static void add() {
      MatrixRegisters::add_signed_unsigned_products<sums, value, p>();
    }
  };
};

}  // namespace
}  // namespace ditattn::kernels::cpu
