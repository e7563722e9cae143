#pragma once

namespace ditattn::kernels::cpu::testing {

/// What is wrong in a level's `Simd`; null if nothing. Only for CPUs of that level.
const char* wrong_word_sse2();
const char* wrong_word_avx2();
const char* wrong_word_avx512();
const char* wrong_word_neon();

}  // namespace ditattn::kernels::cpu::testing
