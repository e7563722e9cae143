// Random problems over all metadata (joint tokens, packed sequences, valid prefixes, spans with query ranges, masks,
// GQA, causal) against the float64 oracle, for every back end, on --device. The bounds are those of the case files.
// --seed and --problems choose others, and how many. Back ends that do not take everything get head sizes and dtypes
// that they take; what else they refuse is counted.

#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/conformance/check_problem.hpp"
#include "tests/conformance/options.hpp"

namespace ditattn {
namespace {

constexpr int kProblems = 500;
constexpr int kGpuProblems = 1000;
constexpr std::uint64_t kFirstSeed = 20259;  // with --seed=1, the default, 20260

using conformance::Drawn;

class Metadata : public testing::TestWithParam<const char*> {};

TEST_P(Metadata, RandomProblemsMatchTheOracle) {
  const DLDevice device = conformance::options().device;
  const bool is_cpu = device.device_type == kDLCPU;
  BackendClass backend;
  try {
    backend = DiffusionAttentionBackendEnum::from_name(GetParam()).get_class();
    backend->validate_available();
  } catch (const ImportError& error) {
    GTEST_SKIP() << "skipped: " << error.message();
  }
  Capabilities can = backend->capabilities();
  if (std::ranges::count(can.devices, device_type_name(device)) == 0) {
    GTEST_SKIP() << GetParam() << " does not compute on " << device_name(device);
  }
  std::erase_if(can.dtypes, [&](DLDataType dtype) {  // on a GPU there may be fewer
    return !backend->explain({.head_size = 64, .dtype = dtype, .device = device});
  });
  const conformance::NamedBackend named{.member = GetParam(), .backend = backend};
  const bool takes_all = can.packed && can.joint && can.has_mask("spans") && can.has_mask("additive");
  double worst = 0;
  double worst_lse = 0;
  int refused = 0;
  const auto problems = static_cast<int>(conformance::options().problems.value_or(is_cpu ? kProblems : kGpuProblems));
  for (int i = 0; i < problems; ++i) {
    const std::uint64_t seed = kFirstSeed + conformance::options().seed + static_cast<std::uint64_t>(i);
    const Drawn drawn = conformance::draw_problem(seed, can);
    SCOPED_TRACE(drawn.text);
    const conformance::Checked checked = conformance::check_problem(named, drawn, device);
    if (!checked.refusal.empty()) {
      ASSERT_FALSE(takes_all) << checked.refusal;
      ++refused;
      continue;
    }
    EXPECT_LE(checked.errors.out, checked.bound);
    EXPECT_LE(checked.errors.lse, checked.lse_bound);
    worst = std::max(worst, checked.errors.out / checked.bound);
    worst_lse = std::max(worst_lse, checked.errors.lse);
    if (HasFailure()) break;
  }
  std::cout << fmt::format("{}: {} problems, {} refused, worst error {:.2f} of the bound, LSE {:.1e}\n", GetParam(),
                           problems, refused, worst, worst_lse);
  EXPECT_GE(problems - refused, problems * (is_cpu ? 2 : 1) / (can.joint ? 5 : 10));
}

INSTANTIATE_TEST_SUITE_P(, Metadata,
                         testing::Values("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN",
                                         "FLASHINFER_ATTN"),
                         [](const auto& instance) { return std::string(instance.param); });

}  // namespace
}  // namespace ditattn
