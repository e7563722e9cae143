#include "kernels/cpu/simd_sse2.hpp"
//
#include "tests/kernels/simd_checks_impl.hpp"
//
#include "tests/kernels/simd_checks.hpp"

namespace ditattn::kernels::cpu::testing {

const char* wrong_word_sse2() { return wrong_word(); }

}  // namespace ditattn::kernels::cpu::testing
