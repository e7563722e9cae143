// Random problems over all metadata, as the conformance tests draw them (tests/conformance/random_problem.hpp), against
// the float64 oracle and within their bounds. The first bytes choose the back end, the size, the scale and the seed
// of the values; all further ones decide about the problem.

#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "tests/conformance/check_problem.hpp"
#include "tests/fuzz/fuzzing.hpp"

namespace {

namespace conformance = ditattn::conformance;

constexpr conformance::Limits kLimits[] = {
    {.queries = 5, .keys = 7, .joint_queries = 3, .joint_keys = 4},
    {.queries = 24, .keys = 40, .joint_queries = 8, .joint_keys = 20},
    {.queries = 24, .keys = 140, .joint_queries = 8, .joint_keys = 70},  // over a block's end
    {.queries = 140, .keys = 40, .joint_queries = 20, .joint_keys = 20},
};
// 0: the default.
constexpr double kScales[] = {0, 0, 0, 0, 1, 0.01, -0.2, 1e-30};

struct Head {
  std::uint8_t backend, limits, scale, is_poisoned;
  std::uint32_t seed;
};

// Bounds are for random numbers, of which a fuzzer finds unlikely ones. Twice of them where an exact back end's output
// is a handful of numbers, which may all be rounded the worst way, and for quantized ones; where these sum too few
// numbers to average out, half of the output's size more, which no output of zeros or of another problem is within.
void check(const conformance::NamedBackend& named, const conformance::Drawn& drawn,
           const conformance::Checked& checked) {
  const auto quantized = conformance::quantization(named, ditattn::kCpu);
  const bool is_exact = quantized.bytes == 0 && !quantized.in_e2m1;
  const bool is_large = drawn.query.numel() >= 1000;
  const double slack = is_exact && is_large ? 1 : 2;
  const double more = is_exact || is_large ? 0 : 0.5;
  const bool holds = checked.errors.out <= slack * checked.bound + more &&
                     checked.errors.lse <= slack * checked.lse_bound * std::max(1., checked.logits / 32) + more;
  const bool rows_are_right = !testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed();
  ditattn::fuzzing::require(
      (checked.refusal.empty() || !is_exact) && holds && rows_are_right,
      fmt::format("{} computes within its bounds ({}): error {} of {}, LSE {} of {} {}", named.member, drawn.text,
                  checked.errors.out, checked.bound, checked.errors.lse, checked.lse_bound, checked.refusal));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const auto backends = conformance::backends_on(ditattn::kCpu);
  Head head;
  if (size < sizeof head) return -1;
  std::memcpy(&head, data, sizeof head);
  const conformance::NamedBackend& named = backends[head.backend % backends.size()];
  conformance::Drawn drawn =
      conformance::draw_problem(head.seed, named.backend->capabilities(), kLimits[head.limits % std::size(kLimits)],
                                {data + sizeof head, size - sizeof head});
  if (const double scale = kScales[head.scale % std::size(kScales)]; scale != 0) drawn.config.softmax_scale = scale;
  if (head.is_poisoned % 2 == 1 && !named.backend->capabilities().masked_nan_propagates) conformance::poison(drawn);
  check(named, drawn, conformance::check_problem(named, drawn, ditattn::kCpu));
  return 0;
}
