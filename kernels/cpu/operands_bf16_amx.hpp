#pragma once

/// Pairs of bfloat16 for `tdpbf16ps`. Included after multiply_amx_impl.hpp.

#include "kernels/cpu/bf16_pairs.hpp"

namespace ditattn::kernels::cpu {
namespace {

struct Operands : Bf16Pairs {
  template <int sums, int a, int b>
  static void add() {
    MatrixRegisters::add_bf16_products<sums, a, b>();
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
