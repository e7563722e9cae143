// Random problems over all metadata, as the conformance tests draw them (tests/conformance/random_problem.hpp), against
// the float64 oracle and within their bounds. The first bytes choose the back end, the size, the scale and the seed
// of the values; all further ones decide about the problem.

#include <ditattn/ditattn.hpp>
#include <gtest/gtest.h>

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
  conformance::check_problem(named, drawn, ditattn::kCpu);
  ditattn::fuzzing::require(!testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed(), "errors are in bounds");
  return 0;
}
