#include <gtest/gtest.h>

#include "kernels/cpu/cpu_level.hpp"
#include "tests/kernels/simd_checks.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

#if defined(__aarch64__)
TEST(Simd, Neon) { EXPECT_STREQ(wrong_word_neon(), nullptr); }
#else
TEST(Simd, Sse2) { EXPECT_STREQ(wrong_word_sse2(), nullptr); }

TEST(Simd, Avx2) {
  if (detect_cpu_level() < CpuLevel::avx2) GTEST_SKIP();
  EXPECT_STREQ(wrong_word_avx2(), nullptr);
}

TEST(Simd, Avx512) {
  if (detect_cpu_level() < CpuLevel::avx512) GTEST_SKIP();
  EXPECT_STREQ(wrong_word_avx512(), nullptr);
}
#endif

}  // namespace
}  // namespace ditattn::kernels::cpu::testing
