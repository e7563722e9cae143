// Random problems over all metadata, spread over 1, 2, 3, 4 and 8 ranks in every mesh, by every back end, against the
// float64 oracle: the same bounds as one rank's, the same refusals, and the same bits when a layer is called again.
// DITATTN_TEST_SEED chooses other problems.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <optional>
#include <string_view>

#include "parallel/heads.hpp"
#include "tests/conformance/run_case.hpp"
#include "tests/parallel/ranks.hpp"

namespace ditattn::parallel::testing {
namespace {

using conformance::Draw;
using conformance::Drawn;
using conformance::NamedBackend;

std::uint64_t first_seed() {
  const char* text = std::getenv("DITATTN_TEST_SEED");
  std::uint64_t seed = 12000;
  if (text != nullptr) std::from_chars(text, text + std::string_view(text).size(), seed);
  return seed;
}

std::optional<NamedBackend> backend_named(const std::string& member) {
  for (const NamedBackend& named : conformance::backends_on(ranks().device(0))) {
    if (named.member == member) return named;
  }
  return std::nullopt;
}

std::vector<std::int64_t> draw_lengths(Draw& draw, std::int64_t total, int size) {
  if (draw.chance(0.3)) return balanced_lengths(total, size);
  const auto cuts = conformance::draw_cuts(draw, total, size);
  std::vector<std::int64_t> lengths;
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) lengths.push_back(cuts[i + 1] - cuts[i]);
  return lengths;
}

struct Tally {
  int computed = 0;
  int refused = 0;
  double worst = 0;      // of the bound
  double worst_lse = 0;  // error
};

// Of what it takes on the ranks' device, where there may be fewer dtypes.
Capabilities capabilities_of(const NamedBackend& named) {
  Capabilities can = named.backend->capabilities();
  std::erase_if(can.dtypes, [&](DLDataType dtype) {
    return !named.backend->explain({.head_size = 64, .dtype = dtype, .device = ranks().device(0)});
  });
  return can;
}

// One problem in every mesh of `size`.
class Check {
 public:
  Check(const NamedBackend& named, std::uint64_t seed, const conformance::Limits& limits)
      : named_(named), seed_(seed), drawn_(conformance::draw_problem(seed, capabilities_of(named), limits)) {
    if (!named.backend->capabilities().masked_nan_propagates) conformance::poison(drawn_);
  }

  void run(int size, Tally& tally) {
    Draw draw(seed_ + 1);
    const auto rows = draw_lengths(draw, drawn_.query.size(1), size);
    const auto keys = draw_lengths(draw, drawn_.key.size(1), size);
    const Cut cut = {.first = draw.number(0, 3), .last = draw.number(0, 3)};
    // Quantized rounding may depend on the heads beside, GPUs' engines cut some sizes otherwise.
    const bool parts_are_alike = is_exact() && ranks().device(0).device_type == kDLCPU;
    compute_alone();
    for (const Mesh& mesh : meshes_of(size)) {
      SCOPED_TRACE(fmt::format("{} on {}, heads cut {}/{} ({}; rows {}, keys {})", named_.member, mesh_name(mesh),
                               cut.first, cut.last, drawn_.text, fmt::join(rows, "+"), fmt::join(keys, "+")));
      try {
        const Whole whole = compute(drawn_, named_.backend, mesh, rows, keys, 1, cut);
        EXPECT_EQ(refusal_, "") << "one rank refuses it";
        if (ranks().is_first) check(whole, tally);
        if (seed_ % 4 == 0) {
          const Whole again = compute(drawn_, named_.backend, mesh, rows, keys, 2, parts_are_alike ? Cut() : cut);
          if (!ranks().is_first) continue;
          EXPECT_TRUE(same_bits(whole.out, again.out) && same_bits(whole.lse, again.lse))
              << "other bits the next time" << (parts_are_alike ? ", or in one part" : "");
        }
      } catch (const ValueError& error) {
        EXPECT_NE(refusal_, "") << "one rank computes it: " << error.message();
        ++tally.refused;
      }
    }
  }

 private:
  void compute_alone() {
    const auto layer = named_.backend->make(drawn_.config);
    const DLDevice device = ranks().device(0);
    Tensor lse = empty(std::array{drawn_.query.size(0), drawn_.query.size(2), drawn_.rows}, kFloat32, device);
    try {
      const Tensor out = on(kCpu, layer->forward(on(device, drawn_.query), on(device, drawn_.key),
                                                 on(device, drawn_.value), on(device, drawn_.metadata), {.lse = lse}));
      lse = on(kCpu, lse);
      if (!ranks().is_first) return;
      expected_ = reference::attention(drawn_.query, drawn_.key, drawn_.value, drawn_.metadata, layer->softmax_scale(),
                                       drawn_.config.causal, named_.backend->capabilities().causal_alignment);
      alone_ = conformance::errors_of(out, lse, expected_);
    } catch (const ValueError& error) {
      refusal_ = error.message();
    }
  }

  void check(const Whole& whole, Tally& tally) {
    const double scale = named_.backend->make(drawn_.config)->softmax_scale();
    EXPECT_EQ(whole.wrong, "");
    const auto quantized = quantization();
    const auto errors = conformance::errors_of(whole.out, whole.lse, expected_);
    const double logits = conformance::logit_size(drawn_, scale);
    // Quantized errors of a handful of numbers, or of a row's only key, do not average out: one rank's are then the
    // measure too.
    const bool exact = is_exact();
    const double bound =
        conformance::bound_for(drawn_, whole.out, scale) + (exact ? 0 : 2 * alone_.out) +
        conformance::quantized_error_bound(quantized, logits, drawn_.config.head_size, errors.result_share);
    EXPECT_LE(errors.out, bound);
    EXPECT_LE(errors.lse, 1e-5 + (exact ? 0 : 2 * alone_.lse) + conformance::quantized_lse_bound(quantized, logits) +
                              conformance::own_lse_bound(named_, drawn_.query.dtype()));
    ++tally.computed;
    tally.worst = std::max(tally.worst, errors.out / bound);
    tally.worst_lse = std::max(tally.worst_lse, errors.lse);
  }

  [[nodiscard]] conformance::Quantization quantization() const {
    return conformance::quantization(named_, ranks().device(0));
  }
  [[nodiscard]] bool is_exact() const { return quantization().bytes == 0 && !quantization().in_e2m1; }

  const NamedBackend& named_;
  std::uint64_t seed_;
  Drawn drawn_;
  std::string refusal_;  // one rank's; empty: it computes
  reference::Result expected_;
  conformance::Errors alone_;
};

void check_problems(const std::string& member, int count, const conformance::Limits& limits) {
  const auto named = backend_named(member);
  if (!named) GTEST_SKIP() << member << " does not compute here";
  for (int size : ranks().sizes) {
    Tally tally;
    for (int i = 0; i < count / ranks().fraction && !::testing::Test::HasFailure(); ++i) {
      Check(*named, first_seed() + static_cast<std::uint64_t>(100 * size + i), limits).run(size, tally);
    }
    if (!ranks().is_first) continue;
    std::cout << fmt::format(
        "{} on {} ranks, seeds from {}: {} computed, {} refused, worst error {:.2f} of the bound, "
        "LSE {:.1e}\n",
        member, size, first_seed() + static_cast<std::uint64_t>(100 * size), tally.computed, tally.refused, tally.worst,
        tally.worst_lse);
    EXPECT_GT(tally.computed, 0);
  }
}

class ParallelConformance : public ::testing::TestWithParam<const char*> {};

TEST_P(ParallelConformance, RandomProblemsMatchTheOracle) { check_problems(GetParam(), 32, {}); }

// Fewer tokens than ranks, ranks without any, one token.
TEST_P(ParallelConformance, FewTokensMatchTheOracle) {
  check_problems(GetParam(), 60, {.queries = 5, .keys = 7, .joint_queries = 3, .joint_keys = 4});
}

// Plans are kept by their metadata: another mask of the same shape is another plan.
TEST(ParallelAttention, MasksMayChangeFromCallToCall) {
  constexpr std::int64_t kTokens = 24;
  Draw draw(first_seed());
  const Tensor query = draw.normal({1, kTokens, 2, 16}, kFloat32);
  const Tensor key = draw.normal({1, kTokens, 2, 16}, kFloat32);
  const BackendClass backend = DiffusionAttentionBackendEnum::TORCH_SDPA.get_class();  // float32 on a GPU too
  const ImplConfig config{.num_heads = 2, .head_size = 16};
  std::vector<AttentionMetadata> masks;
  std::vector<Tensor> expected;
  for (int i = 0; i < 12; ++i) {  // more than are kept
    const Tensor mask = empty({1, 2, kTokens, kTokens}, kBool);
    for (std::int64_t j = 0; j < mask.numel(); ++j) store_element(mask.data_ptr(), j, kBool, draw.chance(0.5) ? 1 : 0);
    masks.emplace_back(AttentionMetadataFields{.attn_mask = mask});
    expected.push_back(backend->make(config)->forward(query, key, key, masks.back()));
  }
  for (int size : ranks().sizes) {
    for (const Mesh& mesh : meshes_of(size)) {
      SCOPED_TRACE(mesh_name(mesh));
      ranks().run(size, [&](const std::shared_ptr<Communicator>& communicator) {
        ParallelAttention layer(backend, config, std::make_shared<ParallelGroup>(communicator, mesh));
        const Range mine = share(kTokens, size, communicator->rank());
        const DLDevice device = ranks().device(communicator->rank());
        std::vector<AttentionMetadata> my_masks;
        for (const AttentionMetadata& mask : masks) my_masks.push_back(on(device, mask));
        for (std::size_t call = 0; call < 3 * masks.size(); ++call) {
          const std::size_t i = call * 5 % masks.size();
          const Tensor keys = on(device, slice(key, 1, mine));
          const Tensor out = on(kCpu, layer.forward(on(device, slice(query, 1, mine)), keys, keys, my_masks[i]));
          const Tensor rows = slice(expected[i], 1, mine);
          for (std::int64_t j = 0; j < out.numel(); ++j) {
            ASSERT_NEAR(load_element(data_pointer(out), j, kFloat32), load_element(data_pointer(rows), j, kFloat32),
                        1e-5);
          }
        }
      });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, ParallelConformance,
                         ::testing::Values("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3", "CUDNN_ATTN",
                                           "FLASHINFER_ATTN"),
                         [](const auto& instance) { return std::string(instance.param); });

}  // namespace
}  // namespace ditattn::parallel::testing
