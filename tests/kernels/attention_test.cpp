#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "kernels/cpu/level_kernels.hpp"
#include "kernels/cpu/tile.hpp"
#include "tests/kernels/check.hpp"
#include "tests/kernels/options.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

class Kernels : public ::testing::TestWithParam<Engine> {
 protected:
  const Engine& engine = GetParam();
  Random random{options().seed};
};

// NaN and Inf where no row sees them, threads, and the size of tiles, which depends on the threads, change no bit.
void check_bits(const Engine& engine, const Spec& spec, Random& random) {
  TestProblem test(spec, random);
  run(engine, test, 1);
  const Buffer out = test.out;
  const Buffer lse = test.lse;
  test.poison_unseen(random);
  run(engine, test, spec.threads);
  EXPECT_EQ(test.out, out) << spec;
  EXPECT_EQ(test.lse, lse) << spec;
}

TEST_P(Kernels, EveryHeadSize) {
  for (std::int64_t head_size = 1; head_size <= 256; ++head_size) {
    for (const ElementType type : kTypes) {
      check_spec(engine, {.type = type, .group = 2, .rows = {5}, .keys = {19}, .head_size = head_size}, random);
    }
  }
}

// Rows and keys beside the edges of vectors, panels, blocks and tiles; GQA fills tiles with rows of several heads.
TEST_P(Kernels, EdgesOfBlocks) {
  for (const std::int64_t rows : {1, 3, 4, 15, 16, 17, 63, 65, 128, 255, 257}) {
    for (const std::int64_t keys : {1, 2, 63, 127, 128, 129, 257}) {
      const ElementType type = kTypes[(rows + keys) % 3];
      check_spec(engine, {.type = type, .group = 1 + keys % 3, .rows = {rows}, .keys = {keys}, .head_size = 20},
                 random);
    }
  }
}

// Few rows and many keys are cut by keys; many rows share packed keys, also of one head, on more threads than tiles.
TEST_P(Kernels, PartsAndPackedHeads) {
  const MaskSpec some{.present = true, .hidden_fraction = 0.4};
  const Spec specs[] = {
      {.group = 3, .rows = {1}, .keys = {2048}, .head_size = 24, .threads = 3},
      {.batch = 2,
       .rows = {128},
       .keys = {2100, 3},
       .head_size = 16,
       .causal = true,
       .causal_offset = 1900,
       .threads = 4},
      {.type = ElementType::bfloat16, .rows = {9}, .keys = {1030, 1500}, .head_size = 33, .masks = {some, some}},
      {.type = ElementType::float16, .batch = 2, .rows = {40}, .keys = {2600}, .head_size = 8, .ranges = true},
      {.rows = {700}, .keys = {400}, .head_size = 16, .threads = 3},
      {.batch = 3, .kv_heads = 2, .group = 2, .rows = {300}, .keys = {200, 77}, .head_size = 16, .threads = 7},
      {.type = ElementType::bfloat16,
       .kv_heads = 4,
       .rows = {500},
       .keys = {301},
       .head_size = 20,
       .causal = true,
       .threads = 2},
  };
  for (const Spec& spec : specs) {
    check_spec(engine, spec, random);
    check_bits(engine, spec, random);
  }
}

TEST_P(Kernels, RandomProblems) {
  for (std::int64_t i = 0; i < options().problems && !HasFailure(); ++i) {
    check_spec(engine, random_spec(random, 1 << 20), random);
  }
}

// Batches, rows, keys and segments of no length; lengths of zero; masks that hide all.
TEST_P(Kernels, Nothing) {
  const MaskSpec all_hidden{.present = true, .hidden_fraction = 1};
  const Spec specs[] = {
      {.batch = 0, .rows = {4}, .keys = {4}},
      {.rows = {0}, .keys = {4}},
      {.rows = {4}, .keys = {0}},
      {.rows = {0, 0}, .keys = {0, 0}},
      {.rows = {0, 5}, .keys = {0, 7}},
      {.rows = {5, 0}, .keys = {7, 0}},
      {.rows = {5}, .keys = {7}, .masks = {all_hidden}},
      {.rows = {40}, .keys = {140, 9}, .masks = {MaskSpec{}, all_hidden}},
      {.rows = {40}, .keys = {140}, .causal = true, .causal_offset = -20},
  };
  for (const Spec& spec : specs) check_spec(engine, spec, random);
}

// With one key, out is V: every float16 and bfloat16 goes through unchanged. Where bfloat16 has its own product,
// subnormal ones count as zero.
TEST_P(Kernels, EveryHalf) {
  for (const ElementType type : {ElementType::float16, ElementType::bfloat16}) {
    TestProblem test({.type = type, .batch = 256, .rows = {1}, .keys = {1}, .head_size = 256, .lse = false}, random);
    for (std::uint32_t bits = 0; bits < 65536; ++bits) test.value[0].set_bits(bits, bits);
    run(engine, test, 1);
    const bool zero_subnormals = engine.units.bf16_dot && type == ElementType::bfloat16;
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < 65536; ++i) {
      const double got = test.out.get(i);
      double want = test.value[0].get(i);
      if (zero_subnormals && std::fabs(want) < 0x1p-126) want = 0;
      if (got != want && !(std::isnan(got) && std::isnan(want))) ++wrong;
    }
    EXPECT_EQ(wrong, 0) << to_string(type);
  }
}

TEST_P(Kernels, BitsDoNotDependOnTheUnseen) {
  for (std::int64_t i = 0; i < options().problems / 5; ++i) check_bits(engine, random_spec(random, 1 << 18), random);
}

TEST_P(Kernels, BitsDoNotDependOnTiles) {
  check_bits(engine,
             {.batch = 2, .kv_heads = 2, .rows = {256}, .keys = {300}, .head_size = 8, .ranges = true, .threads = 3},
             random);
}

INSTANTIATE_TEST_SUITE_P(, Kernels, ::testing::ValuesIn(engines()),
                         [](const auto& parameter) { return parameter.param.name; });

TEST(Levels, KernelsHaveARate) {
  for (int level = 0; level <= static_cast<int>(detect_cpu_level()); ++level) {
    const LevelKernels& kernels = kernels_of(static_cast<CpuLevel>(level));
    const double f32 = kernels.flash_f32->multiply_rate();
    EXPECT_GT(f32, 0) << kCpuLevelNames[level];
    EXPECT_LT(f32, 128) << kCpuLevelNames[level] << ": more multiply-adds per tick than any core has; optimized away?";
    EXPECT_GT(kernels.sage->multiply_rate(), 0) << kCpuLevelNames[level];
    EXPECT_LT(kernels.sage->multiply_rate(), 8192) << kCpuLevelNames[level];
  }
}

TEST(Levels, UnitsAreTheLevels) {
  for (int level = 0; level <= static_cast<int>(detect_cpu_level()); ++level) {
    const auto wanted = static_cast<CpuLevel>(level);
    const CpuUnits units = choose_units(wanted, true);
    EXPECT_EQ(units.level, wanted);
    EXPECT_EQ(units.bf16_dot, kernels_of(wanted).flash_bf16_dot != nullptr);
  }
}

}  // namespace
}  // namespace ditattn::kernels::cpu::testing
