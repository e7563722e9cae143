// sage_attention at every level against its own arithmetic in double precision, and against exact attention.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "kernels/cpu/sage_attention.hpp"
#include "tests/kernels/check.hpp"
#include "tests/kernels/options.hpp"
#include "tests/kernels/sage_reference.hpp"
#ifdef DITATTN_EMULATES_AMX
#include "tests/kernels/amx_emulated.hpp"
#endif

namespace ditattn::kernels::cpu::testing {
namespace {

struct SageEngine {
  std::string name;
  CpuLevel level;
  SageNumbers numbers;
  const TileKernel* kernel = nullptr;  // instead of the level's
};

std::vector<SageEngine> sage_engines() {
  std::vector<SageEngine> engines;
  for (int i = 0; i <= static_cast<int>(detect_cpu_level()); ++i) {
    const std::string level = kCpuLevelNames[i];
    const bool has_7_bits = level == "avx2" || level == "avx512";  // multiply bytes by pmaddubsw
    SageNumbers numbers{.key_most = has_7_bits ? 63. : 127., .probability_most = has_7_bits ? 127. : 255.};
    engines.push_back({.name = "sage_" + level, .level = static_cast<CpuLevel>(i), .numbers = numbers});
    numbers.wide_values = true;
    engines.push_back({.name = "sage_wide_" + level, .level = static_cast<CpuLevel>(i), .numbers = numbers});
  }
#ifdef DITATTN_EMULATES_AMX
  if (detect_cpu_level() >= CpuLevel::avx512) {
    engines.push_back({.name = "sage_amx_emulated", .level = {}, .numbers = {}, .kernel = &kSageAmxEmulated});
  }
#endif
  return engines;
}

std::ostream& operator<<(std::ostream& out, const SageEngine& engine) { return out << engine.name; }

void run(const SageEngine& engine, TestProblem& test, int threads, bool smooth_key) {
  test.clear_results();
  AttentionProblem problem = test.problem();
  problem.smooth_key = smooth_key;
  if (engine.kernel != nullptr) return sage_attention(problem, executor(threads), *engine.kernel);
  sage_attention(problem, executor(threads), engine.level, {.wide_values = engine.numbers.wide_values});
}

class Sage : public ::testing::TestWithParam<SageEngine> {
 protected:
  const SageEngine& engine = GetParam();
  Random random{options().seed};

  // A number between two may be rounded otherwise than in double precision, by one step of 255 or 127: of P now and
  // then, which shows in small problems, and of Q and K where 16-bit elements lie exactly between, which moves a row's
  // logits.
  [[nodiscard]] Bounds bounds(const TestProblem& test) const {
    const AttentionProblem& p = test.problem();
    const double step = engine.numbers.key_most == 127 ? 1 : 2;
    const bool many = p.batch * p.heads * p.rows * p.head_size >= 1000;
    return {.error = (many ? 1e-3 : 5e-3) * step, .lse = (p.type == ElementType::float32 ? 2e-3 : 2.5e-2) * step};
  }

  void check(Spec spec, bool smooth_key = true) {
    spec.specials_seen = false;
    for (MaskSpec& mask : spec.masks) {  // keys alone: the same for all rows and heads
      mask.type = ElementType::boolean;
      mask.per_head = mask.per_row = mask.some_rows = false;
    }
    TestProblem test(spec, random);
    test.poison_unseen(random);
    run(engine, test, spec.threads, smooth_key);
    SageNumbers numbers = engine.numbers;
    numbers.smooth_key = smooth_key;
    check_results(engine.name, test, expected_sage_results(test.problem(), numbers), bounds(test));
    const Buffer out = test.out;
    run(engine, test, spec.threads % 3 + 1, smooth_key);
    EXPECT_EQ(test.out, out) << "bits depend on the threads; " << spec;
  }
};

TEST_P(Sage, HeadSizes) {
  for (std::int64_t size = 1; size <= 256; size += size < 20 || size > 250 ? 1 : 7) {
    check({.type = kTypes[size % 3], .group = 2, .rows = {20}, .keys = {150}, .head_size = size});
  }
}

TEST_P(Sage, RandomProblems) {
  for (std::int64_t i = 0; i < options().problems / 3 && !HasFailure(); ++i) {
    check(random_spec(random, 1 << 19), i % 4 != 0);
  }
}

TEST_P(Sage, PartsAndPackedHeads) {
  check({.group = 3, .rows = {1}, .keys = {2048}, .head_size = 24, .threads = 3});
  check({.batch = 2, .rows = {60}, .keys = {2100, 3}, .head_size = 16, .causal = true, .causal_offset = 1900});
  check({.type = ElementType::bfloat16, .kv_heads = 2, .rows = {500}, .keys = {301}, .head_size = 20, .threads = 2});
}

// Relative to ‖exact‖, on random normals and with one K channel in 32 offset by 20 σ.
TEST_P(Sage, ErrorAgainstExactAttention) {
  for (const std::int64_t head_size : {64, 72, 128}) {
    for (const double offset : {0.0, 20.0}) {
      const Spec spec{.rows = {48}, .keys = {2304}, .head_size = head_size};
      TestProblem test(spec, random);
      std::normal_distribution<double> normal;
      for (std::int64_t i = 0; i < 48 * head_size; ++i) test.query[0].set(i, normal(random));
      for (std::int64_t i = 0; i < 2304 * head_size; ++i) {
        test.key[0].set(i, normal(random) + (i % head_size % 32 == 5 ? offset : 0));
        test.value[0].set(i, normal(random));
      }
      run(engine, test, 1, true);
      const Expected exact = expected_results(test.problem());
      double difference = 0;
      double norm = 0;
      for (std::size_t i = 0; i < exact.out.size(); ++i) {
        difference += std::pow(test.out.get(static_cast<std::int64_t>(i)) - exact.out[i], 2);
        norm += std::pow(exact.out[i], 2);
      }
      const double error = std::sqrt(difference / norm);
      std::printf("%s, head size %lld, K %s: relative L2 error %.2e\n", engine.name.c_str(),
                  static_cast<long long>(head_size), offset == 0 ? "normal" : "with outlier channels", error);
      EXPECT_LE(error, offset == 0 ? 3e-2 : 4e-2);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, Sage, ::testing::ValuesIn(sage_engines()),
                         [](const auto& parameter) { return parameter.param.name; });

}  // namespace
}  // namespace ditattn::kernels::cpu::testing
