// sage3_attention at every level against docs/kernels/sage3.md in double precision, and against exact attention.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include "kernels/cpu/sage3_attention.hpp"
#include "tests/kernels/check.hpp"
#include "tests/kernels/draw.hpp"
#include "tests/kernels/options.hpp"
#include "tests/kernels/sage3_reference.hpp"
#ifdef DITATTN_EMULATES_AMX
#include "tests/kernels/amx_emulated.hpp"
#endif

namespace ditattn::kernels::cpu::testing {
namespace {

struct Sage3Engine {
  std::string name;
  CpuUnits units;
  const TileKernel* kernel = nullptr;  // instead of the units'
};

std::vector<Sage3Engine> sage3_engines() {
  std::vector<Sage3Engine> engines;
  for (int i = 0; i <= static_cast<int>(detect_cpu_level()); ++i) {
    engines.push_back(
        {.name = std::string("sage3_") + kCpuLevelNames[i], .units = choose_units(static_cast<CpuLevel>(i), true)});
  }
#ifdef DITATTN_EMULATES_AMX
  if (detect_cpu_level() >= CpuLevel::avx512_bf16) {
    engines.push_back({.name = "sage3_amx_emulated", .units = {}, .kernel = &kSage3AmxEmulated});
  }
#endif
  return engines;
}

std::ostream& operator<<(std::ostream& out, const Sage3Engine& engine) { return out << engine.name; }

void run(const Sage3Engine& engine, TestProblem& test, int threads, Sage3Smoothing smoothing) {
  test.clear_results();
  if (engine.kernel != nullptr) return sage3_attention(test.problem(), executor(threads), *engine.kernel, smoothing);
  sage3_attention(test.problem(), executor(threads), engine.units, smoothing);
}

struct Errors {
  double out = 0;  // ‖out − expected‖ / ‖what it is relative to‖
  double lse = 0;  // the largest |lse − expected| / max(1, |expected|)
};

Errors errors_of(const TestProblem& test, const Expected& expected, const std::vector<double>& relative_to) {
  const AttentionProblem& p = test.problem();
  double difference = 0;
  double norm = 0;
  Errors errors;
  std::size_t at = 0;
  std::size_t index = 0;
  const auto offset = [](const Strides& s, std::int64_t b, std::int64_t row, std::int64_t head) {
    return b * s.batch + row * s.token + head * s.head;
  };
  const auto add_row = [&](std::int64_t b, std::int64_t row, std::int64_t head) {
    for (std::int64_t d = 0; d < p.head_size; ++d, ++at) {
      difference += std::pow(test.out.get(offset(p.out_strides, b, row, head) + d) - expected.out[at], 2);
      norm += std::pow(relative_to[at], 2);
    }
    const double lse = expected.lse[index++];
    if (p.lse == nullptr || std::isinf(lse)) return;
    const double off = std::fabs(test.lse.get(offset(p.lse_strides, b, row, head)) - lse);
    errors.lse = std::max(errors.lse, off / std::max(1.0, std::fabs(lse)));
  };
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t row = 0; row < p.rows; ++row) {
      for (std::int64_t head = 0; head < p.heads; ++head) add_row(b, row, head);
    }
  }
  errors.out = difference == 0 ? 0 : std::sqrt(difference / norm);
  return errors;
}

// Normals, with an offset in one channel of so many.
struct Offset {
  double size = 0;
  std::int64_t channels = 1;
};

void draw_normals(Buffer& buffer, std::int64_t head_size, Offset offset, Random& random) {
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < buffer.size(); ++i) {
    buffer.set(i, normal(random) + (i % head_size % offset.channels == 0 ? offset.size : 0));
  }
}

class Sage3 : public ::testing::TestWithParam<Sage3Engine> {
 protected:
  const Sage3Engine& engine = GetParam();
  Random random{options().seed};

  // Float32 sums in another order put a number on the other side of a tie now and then (about one problem in 1000), and
  // it is then a whole step off: up to a third of its group's largest number for Q, K and V, up to 0.4 of one key's
  // weight for P, an eighth of a whole group where it was the group's scale. That is 0.4 / keys / √rows of the results
  // (P), or 0.6 / keys / √head size (V), or 1 / √head size of a logit (Q, K): more than the target of 1.5e-3 where
  // these are few, which is why each problem has a loose bound, and all but a few of them the target.
  static constexpr double kTarget = 1.5e-3;
  static constexpr double kLseTarget = 1e-4;
  static constexpr Bounds kOneMoved{.error = 0.05, .lse = 0.3};
  static constexpr Bounds kOneMovedOfFew{.error = 0.2, .lse = 1};

  void check(TestProblem& test, Sage3Smoothing smoothing) {
    SCOPED_TRACE(::testing::Message() << "smooth_q=" << smoothing.query << " smooth_k=" << smoothing.key
                                      << " smooth_v=" << smoothing.value);
    const int threads = test.spec().threads;
    run(engine, test, threads, smoothing);
    const Expected expected = expected_sage3_results(test.problem(), smoothing);
    check_results(engine.name, test, expected, expected.out.size() >= 1000 ? kOneMoved : kOneMovedOfFew);
    const Errors errors = errors_of(test, expected, expected.magnitude);
    const ElementType type = test.spec().type;
    const double rounding = type == ElementType::float32 ? 0 : type == ElementType::float16 ? 6e-4 : 4e-3;
    ++problems_;
    if (errors.out > kTarget + rounding || errors.lse > kLseTarget) {
      ++beyond_target_;
      std::printf("%s: beyond the target by rounding: error %.2e, LSE %.2e\n", engine.name.c_str(), errors.out,
                  errors.lse);
    }
    const Buffer out = test.out;
    const Buffer lse = test.lse;
    run(engine, test, threads % 3 + 1, smoothing);
    EXPECT_EQ(test.out, out) << "bits depend on the threads; " << test.spec();
    EXPECT_EQ(test.lse, lse) << "bits of the LSE depend on the threads; " << test.spec();
  }

  void check(Spec spec, Sage3Smoothing smoothing = {}) {
    spec.specials_seen = false;
    for (MaskSpec& mask : spec.masks) {  // keys alone: the same for all rows and heads
      mask.type = ElementType::boolean;
      mask.per_head = mask.per_row = mask.some_rows = false;
    }
    TestProblem test(spec, random);
    test.poison_unseen(random);
    check(test, smoothing);
  }

  void TearDown() override {
    EXPECT_LE(beyond_target_, 1 + problems_ / 50) << "of " << problems_ << " problems: too many for rounding";
  }

 private:
  std::int64_t problems_ = 0;
  std::int64_t beyond_target_ = 0;
};

TEST_P(Sage3, HeadSizes) {
  for (std::int64_t size = 1; size <= 256; size += size < 20 || size > 250 ? 1 : 7) {
    check({.type = kTypes[size % 3], .group = 2, .rows = {70}, .keys = {150}, .head_size = size});
  }
}

TEST_P(Sage3, RandomProblems) {
  for (std::int64_t i = 0; i < options().problems / 3 && !HasFailure(); ++i) {
    const Spec spec = random_spec(random, 1 << 19);
    check(spec, {.query = chance(random, 0.7), .key = chance(random, 0.7), .value = chance(random, 0.7)});
  }
}

TEST_P(Sage3, PartsAndPackedHeads) {
  check({.group = 3, .rows = {1}, .keys = {2048}, .head_size = 24, .threads = 3});
  check({.group = 2, .rows = {30, 70}, .keys = {1100, 1300}, .head_size = 40, .lengths = true, .threads = 2});
  check({.batch = 2, .rows = {60}, .keys = {2100, 3}, .head_size = 16, .causal = true, .causal_offset = 1900});
  check({.type = ElementType::bfloat16, .kv_heads = 2, .rows = {500}, .keys = {301}, .head_size = 20, .threads = 2});
  check({.kv_heads = 2, .group = 3, .rows = {5}, .keys = {300}, .head_size = 48, .threads = 2});
  check({.batch = 2, .group = 5, .rows = {40, 33}, .keys = {129, 260}, .head_size = 72, .causal = true, .threads = 3});
  check({.batch = 2, .group = 3, .rows = {90}, .keys = {700}, .head_size = 33, .ranges = true});
}

TEST_P(Sage3, SmoothingSwitches) {
  for (int bits = 0; bits < 8; ++bits) {
    const Sage3Smoothing smoothing{.query = (bits & 1) != 0, .key = (bits & 2) != 0, .value = (bits & 4) != 0};
    for (const ElementType type : {ElementType::float32, ElementType::bfloat16}) {
      TestProblem test({.type = type, .group = 2, .rows = {90, 20}, .keys = {400, 70}, .head_size = 43}, random);
      for (int i = 0; i < 2; ++i) {
        draw_normals(test.query[i], 43, {.size = 2, .channels = 3}, random);
        draw_normals(test.key[i], 43, {.size = 4, .channels = 5}, random);
        draw_normals(test.value[i], 43, {.size = 3, .channels = 4}, random);
      }
      check(test, smoothing);
    }
  }
}

// Q and V keep their means where 64 rows or fewer have them.
TEST_P(Sage3, FewRowsAreNotSmoothed) {
  for (const std::int64_t tokens : {64, 65}) {
    TestProblem test({.rows = {tokens}, .keys = {tokens}, .head_size = 32}, random);
    for (Buffer* buffer : {&test.query[0], &test.value[0]}) draw_normals(*buffer, 32, {.size = 3}, random);
    run(engine, test, 1, {.query = false, .key = true, .value = false});
    const Buffer plain = test.out;
    run(engine, test, 1, {.query = true, .key = true, .value = false});
    EXPECT_EQ(test.out == plain, tokens == 64) << "Q, " << tokens << " rows";
    run(engine, test, 1, {.query = false, .key = true, .value = true});
    EXPECT_EQ(test.out == plain, tokens == 64) << "V, " << tokens << " keys";
  }
}

// Relative to ‖exact‖.
TEST_P(Sage3, ErrorAgainstExactAttention) {
  struct Case {
    const char* name;
    double bound;
    Offset query, key, value;
  };
  const Case cases[] = {
      {.name = "normals", .bound = 0.22, .query = {}, .key = {}, .value = {}},
      {.name = "K with outlier channels", .bound = 0.23, .query = {}, .key = {.size = 20, .channels = 32}, .value = {}},
      {.name = "Q with outlier channels", .bound = 0.23, .query = {.size = 20, .channels = 32}, .key = {}, .value = {}},
      {.name = "V offset by 3", .bound = 0.006, .query = {}, .key = {}, .value = {.size = 3}}};
  for (const std::int64_t head_size : {64, 72, 128}) {
    for (const Case& numbers : cases) {
      TestProblem test({.kv_heads = 2, .rows = {96}, .keys = {1200}, .head_size = head_size}, random);
      draw_normals(test.query[0], head_size, numbers.query, random);
      draw_normals(test.key[0], head_size, numbers.key, random);
      draw_normals(test.value[0], head_size, numbers.value, random);
      run(engine, test, 1, {});
      const Expected exact = expected_results(test.problem());
      const double error = errors_of(test, exact, exact.out).out;
      std::printf("%s, head size %lld, %s: relative L2 error %.2e\n", engine.name.c_str(),
                  static_cast<long long>(head_size), numbers.name, error);
      EXPECT_LE(error, numbers.bound);
    }
  }
}

// The definition's results of problem `index`, which is the same for all engines.
const Expected& expected_of_normals(const TestProblem& test, int index) {
  static std::map<int, Expected> known;
  const auto [at, is_new] = known.try_emplace(index);
  if (is_new) at->second = expected_sage3_results(test.problem(), {});
  return at->second;
}

// Relative to ‖expected‖, of one head, seven times: where one of the larger probabilities is on the other side of a tie
// (about one head in 30), it is beyond the target.
TEST_P(Sage3, ArithmeticAgainstFloat64) {
  int index = 0;
  for (const std::int64_t head_size : {64, 96, 128}) {
    std::vector<double> errors;
    double lse = 0;
    for (int i = 0; i < 7; ++i) {
      TestProblem test({.rows = {256}, .keys = {640}, .head_size = head_size}, random);
      for (Buffer* buffer : {&test.query[0], &test.key[0], &test.value[0]}) {
        draw_normals(*buffer, head_size, {}, random);
      }
      run(engine, test, 2, {});
      const Expected& expected = expected_of_normals(test, index++);
      const Errors own = errors_of(test, expected, expected.out);
      errors.push_back(own.out);
      lse = std::max(lse, own.lse);
    }
    std::sort(errors.begin(), errors.end());
    std::printf("%s, head size %lld: relative L2 error %.2e against float64, at most %.2e; LSE %.2e\n",
                engine.name.c_str(), static_cast<long long>(head_size), errors[3], errors.back(), lse);
    EXPECT_LE(errors[3], kTarget);
    EXPECT_LE(errors.back(), 3e-2);
    EXPECT_LE(lse, 3e-2);
  }
}

INSTANTIATE_TEST_SUITE_P(, Sage3, ::testing::ValuesIn(sage3_engines()),
                         [](const auto& parameter) { return parameter.param.name; });

}  // namespace
}  // namespace ditattn::kernels::cpu::testing
