#include "tests/kernels/check.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <utility>

namespace ditattn::kernels::cpu::testing {
namespace {

constexpr double kLseBound = 1e-5;

double bound_for(ElementType type, std::int64_t elements) {
  const bool many = elements >= 1000;
  if (type == ElementType::float32) return 2e-6;
  return type == ElementType::bfloat16 ? (many ? 2.5e-3 : 4e-3) : (many ? 3.5e-4 : 6e-4);
}

struct Worst {
  double error = 0;
  double share = 0;  // of the bound
  double lse = 0;
  double lse_bound = 0;
  std::int64_t problems = 0;
};

std::map<std::pair<std::string, std::string>, Worst>& worst_errors() {
  static std::map<std::pair<std::string, std::string>, Worst> errors;
  return errors;
}

// One pass over a problem's results.
struct Comparison {
  const TestProblem& test;
  const Expected& expected;
  double difference = 0, norm = 0, lse_error = 0;
  std::int64_t elements = 0;
  std::int64_t wrong_class = 0;    // finite where it must not be, or the other way round
  std::int64_t wrong_nothing = 0;  // not zero, or an LSE other than −∞, where no key is seen

  void run() {
    const AttentionProblem& p = test.problem();
    std::size_t row_index = 0;
    for (std::int64_t b = 0; b < p.batch; ++b) {
      for (std::int64_t row = 0; row < p.rows; ++row) {
        for (std::int64_t head = 0; head < p.heads; ++head, ++row_index) compare_row(b, row, head, row_index);
      }
    }
  }

  void compare_row(std::int64_t b, std::int64_t row, std::int64_t head, std::size_t index) {
    const AttentionProblem& p = test.problem();
    const auto depth = static_cast<std::size_t>(p.head_size);
    const Strides& s = p.out_strides;
    const std::int64_t first = b * s.batch + row * s.token + head * s.head;
    const double lse = expected.lse[index];
    const bool nothing = lse == -std::numeric_limits<double>::infinity();
    for (std::size_t d = 0; d < depth; ++d) {
      const double got = test.out.get(first + static_cast<std::int64_t>(d));
      const double want = expected.out[index * depth + d];
      if (nothing && got != 0) ++wrong_nothing;
      if (std::isfinite(got) != std::isfinite(want)) ++wrong_class;
      if (!std::isfinite(got) || !std::isfinite(want)) continue;
      ++elements;
      difference += (got - want) * (got - want);
      norm += expected.magnitude[index * depth + d] * expected.magnitude[index * depth + d];
    }
    if (p.lse == nullptr) return;
    const Strides& l = p.lse_strides;
    const double got = test.lse.get(b * l.batch + row * l.token + head * l.head);
    if (nothing && got != lse) ++wrong_nothing;
    if (std::isfinite(got) != std::isfinite(lse)) ++wrong_class;
    if (!std::isfinite(got) || !std::isfinite(lse)) return;
    lse_error = std::max(lse_error, std::fabs(got - lse) / std::max(1.0, std::fabs(lse)));
  }
};

}  // namespace

void check_results(const std::string& engine, const TestProblem& test, const Expected& expected, Bounds bounds) {
  Comparison comparison{.test = test, .expected = expected};
  comparison.run();
  const double bound = bounds.error + bounds.rounding * bound_for(test.spec().type, comparison.elements);
  const double error = comparison.difference == 0 ? 0 : std::sqrt(comparison.difference / comparison.norm);
  EXPECT_LE(error, bound) << test.spec();
  EXPECT_LE(comparison.lse_error, bounds.lse) << test.spec();
  EXPECT_EQ(comparison.wrong_class, 0) << "finite or not is wrong; " << test.spec();
  EXPECT_EQ(comparison.wrong_nothing, 0) << "rows without keys are not zero; " << test.spec();
  EXPECT_EQ(test.count_overwritten(), 0) << "written between rows; " << test.spec();
  Worst& worst = worst_errors()[{engine, to_string(test.spec().type)}];
  worst.error = std::max(worst.error, error);
  worst.share = std::max(worst.share, error / bound);
  worst.lse = std::max(worst.lse, comparison.lse_error);
  worst.lse_bound = bounds.lse;
  ++worst.problems;
}

void run_and_check(const Engine& engine, TestProblem& test) {
  run(engine, test, test.spec().threads);
  check_results(engine.name, test, expected_results(test.problem()), {.error = 0, .lse = kLseBound});
}

void check_spec(const Engine& engine, const Spec& spec, Random& random) {
  TestProblem test(spec, random);
  test.poison_unseen(random);
  if (spec.specials_seen) test.poison_one_seen(random);
  run_and_check(engine, test);
}

void print_errors() {
  for (const auto& [key, worst] : worst_errors()) {
    std::printf("worst error of %s, %s: %.2e (%.0f %% of its bound), LSE %.2e (%.0f %%), over %lld problems\n",
                key.first.c_str(), key.second.c_str(), worst.error, 100 * worst.share, worst.lse,
                100 * worst.lse / worst.lse_bound, static_cast<long long>(worst.problems));
  }
}

}  // namespace ditattn::kernels::cpu::testing
