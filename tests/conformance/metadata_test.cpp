// Random problems over all metadata (joint tokens, packed sequences, valid prefixes, spans with query ranges, masks,
// GQA, causal) against the float64 oracle, for every back end, on --device. The bounds are those of the case files.
// Back ends that do not take everything get head sizes and dtypes that they take; what else they refuse is counted.

#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "backends/reference/reference.hpp"
#include "tests/conformance/options.hpp"
#include "tests/conformance/random_problem.hpp"
#include "tests/conformance/run_case.hpp"

namespace ditattn {
namespace {

constexpr int kProblems = 500;
constexpr int kGpuProblems = 1000;
constexpr std::uint64_t kFirstSeed = 20260;

using conformance::Drawn;

class Metadata : public testing::TestWithParam<const char*> {};

TEST_P(Metadata, RandomProblemsMatchTheOracle) {
  const DLDevice device = conformance::options().device;
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
  const conformance::Quantization quantized = conformance::quantization(named, device);
  const bool takes_all = can.packed && can.joint && can.has_mask("spans") && can.has_mask("additive");
  double worst = 0;
  double worst_lse = 0;
  int refused = 0;
  const int problems = device.device_type == kDLCPU ? kProblems : kGpuProblems;
  for (int i = 0; i < problems; ++i) {
    const Drawn drawn = conformance::draw_problem(kFirstSeed + static_cast<std::uint64_t>(i), can);
    SCOPED_TRACE(drawn.text);
    const auto impl = backend->make(drawn.config);
    Tensor lse = empty(std::array{drawn.query.size(0), drawn.config.num_heads, drawn.rows}, kFloat32, device);
    Tensor out;
    try {
      out = impl->forward(copy_to(drawn.query, device), copy_to(drawn.key, device), copy_to(drawn.value, device),
                          copy_to(drawn.metadata, device), {.lse = lse});
      out = copy_to(out, kCpu);
      lse = copy_to(lse, kCpu);
    } catch (const ValueError& error) {
      ASSERT_FALSE(takes_all) << error.message();
      ++refused;
      continue;
    }
    const reference::Result expected =
        reference::attention(drawn.query, drawn.key, drawn.value, drawn.metadata, impl->softmax_scale(),
                             drawn.config.causal, can.causal_alignment);
    const conformance::Errors errors = conformance::errors_of(out, lse, expected);
    const double logits = conformance::logit_size(drawn, impl->softmax_scale());
    const double bound = conformance::bound_for(drawn, out, impl->softmax_scale()) +
                         conformance::quantized_error_bound(quantized, logits, errors.result_share);
    EXPECT_LE(errors.out, bound);
    EXPECT_LE(errors.lse, 1e-5 + conformance::quantized_lse_bound(quantized, logits) +
                              conformance::own_lse_bound(named, drawn.query.dtype()));
    worst = std::max(worst, errors.out / bound);
    worst_lse = std::max(worst_lse, errors.lse);
    if (HasFailure()) break;
  }
  std::cout << fmt::format("{}: {} problems, {} refused, worst error {:.2f} of the bound, LSE {:.1e}\n", GetParam(),
                           problems, refused, worst, worst_lse);
  EXPECT_GE(problems - refused, can.joint ? 200 : 100);
}

INSTANTIATE_TEST_SUITE_P(, Metadata,
                         testing::Values("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN",
                                         "FLASHINFER_ATTN"),
                         [](const auto& instance) { return std::string(instance.param); });

}  // namespace
}  // namespace ditattn
