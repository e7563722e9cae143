// What users of vLLM-Omni meet here, with the real back ends: what is kept, what differs, what is not here yet.
// docs/vllm-omni.md lists all of it and names these tests.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "ditattn/ditattn.hpp"
#include "tests/unit/packed_metadata.hpp"
#include "tests/unit/registry/registry_fixture.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::error_text;
using testing::packed;
using testing::ScopedEnvironment;
using testing::with;

constexpr const char* kVariable = "DIFFUSION_ATTENTION_BACKEND";
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kSize = 24;

Tensor random_tensor(std::initializer_list<std::int64_t> shape, std::uint64_t seed) {
  Tensor tensor = empty(shape, kFloat32);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < tensor.numel(); ++i) store_element(tensor.data_ptr(), i, kFloat32, normal(generator));
  return tensor;
}

// A bool mask whose element i is seen(i).
Tensor bool_mask(std::initializer_list<std::int64_t> shape, const std::function<bool(std::int64_t)>& seen) {
  Tensor mask = empty(shape, kBool);
  for (std::int64_t i = 0; i < mask.numel(); ++i) store_element(mask.data_ptr(), i, kBool, seen(i) ? 1 : 0);
  return mask;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.numel() == b.numel() &&
         std::memcmp(a.data_ptr(), b.data_ptr(), static_cast<std::size_t>(a.numel()) * sizeof(float)) == 0;
}

// The largest difference, NaN if any element is.
double difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(shape_name(a), shape_name(b));
  double largest = 0;
  for (std::int64_t i = 0; i < std::min(a.numel(), b.numel()); ++i) {
    const double here =
        std::abs(load_element(data_pointer(a), i, kFloat32) - load_element(data_pointer(b), i, kFloat32));
    if (!(here <= largest)) largest = here;
  }
  return largest;
}

// The first `keys` keys of a (1, …) tensor, in place.
Tensor first_keys(const Tensor& tensor, std::int64_t keys) {
  return wrap(tensor.data_ptr(), {1, keys, tensor.size(2), tensor.size(3)}, kFloat32);
}

// One problem for a back end of the CPU: each test runs once for FLASH_ATTN and once for TORCH_SDPA.
class VllmOmni : public ::testing::TestWithParam<const char*> {
 protected:
  void TearDown() override { set_num_threads(0); }

  [[nodiscard]] static BackendClass backend() { return Enum::from_name(GetParam()).get_class(); }
  [[nodiscard]] static std::unique_ptr<AttentionImpl> layer() {
    return backend()->make({.num_heads = kHeads, .head_size = kSize});
  }
  struct Inputs {
    std::int64_t batch, rows, keys;
    Tensor query = random_tensor({batch, rows, kHeads, kSize}, 1);
    Tensor key = random_tensor({batch, keys, kHeads, kSize}, 2);
    Tensor value = random_tensor({batch, keys, kHeads, kSize}, 3);

    [[nodiscard]] Tensor forward(const AttentionMetadataFields& fields = {}) const {
      return layer()->forward(query, key, value, AttentionMetadata(fields));
    }
    [[nodiscard]] std::string error(const AttentionMetadataFields& fields) const {
      return error_text<ValueError>([&] { return forward(fields); });
    }
  };
};

INSTANTIATE_TEST_SUITE_P(Cpu, VllmOmni, ::testing::Values("FLASH_ATTN", "TORCH_SDPA"),
                         [](const auto& test) { return std::string(test.param); });

// --- Classes

TEST_P(VllmOmni, AnyHeadSizeBeyondUpstreamsToo) {
  EXPECT_TRUE(backend()->get_supported_head_sizes().empty());
  EXPECT_FALSE(backend()->supports_head_size(0));
  const std::int64_t size = 1030;
  const Tensor x = random_tensor({1, 3, 1, size}, 4);
  const Tensor out = backend()->make({.num_heads = 1, .head_size = size})->forward(x, x, x);
  EXPECT_FALSE(std::isnan(difference(out, x)));
}

TEST_P(VllmOmni, KvHeadsThatDoNotDivideAreRefusedWhereALayerIsMade) {
  EXPECT_EQ(error_text<ValueError>([] { return backend()->make({.num_heads = 6, .head_size = 8, .num_kv_heads = 4}); }),
            "GQA requires query heads to be a multiple of KV heads, got q_heads=6 and kv_heads=4.");
}

TEST_P(VllmOmni, IgnoredOptionsNameTheBackend) {
  const testing::LogRecorder log;
  static_cast<void>(
      backend()->make({.num_heads = 1, .head_size = 8, .backend_kwargs = {{"zeta", 1}, {"alpha", true}}}));
  EXPECT_EQ(log.of(LogLevel::warning),
            std::vector<std::string>{backend()->get_name() + " ignoring backend_kwargs: ['alpha', 'zeta']"});
}

// --- Masks

TEST_P(VllmOmni, TwoDimensionsOfAMaskAreBatchAndKeys) {
  const Inputs inputs{.batch = 2, .rows = 5, .keys = 9};
  const auto seen = [](std::int64_t i) { return i % 4 != 1; };
  const Tensor expected = inputs.forward({.attn_mask = bool_mask({2, 1, 1, 9}, seen)});
  EXPECT_TRUE(same_bits(inputs.forward({.attn_mask = bool_mask({2, 9}, seen)}), expected));
  EXPECT_GT(difference(inputs.forward(), expected), 0.01) << "the mask does hide something";
}

TEST_P(VllmOmni, TrueKeepsAKey) {
  const Inputs inputs{.batch = 1, .rows = 5, .keys = 9};
  const Tensor expected = layer()->forward(inputs.query, first_keys(inputs.key, 6), first_keys(inputs.value, 6));
  const Tensor mask = bool_mask({1, 9}, [](std::int64_t i) { return i < 6; });
  EXPECT_LT(difference(inputs.forward({.attn_mask = mask}), expected), 1e-6);
}

// Self-attention and cross-attention alike: a mask hides keys, and no row of the output is zeroed.
TEST_P(VllmOmni, PaddedQueryRowsAreComputed) {
  for (const std::int64_t rows : {9, 7}) {
    const Inputs inputs{.batch = 1, .rows = rows, .keys = 9};
    const Tensor out = inputs.forward({.attn_mask = bool_mask({1, 9}, [](std::int64_t i) { return i < 6; })});
    const Tensor expected = layer()->forward(inputs.query, first_keys(inputs.key, 6), first_keys(inputs.value, 6));
    EXPECT_LT(difference(out, expected), 1e-6);
    for (std::int64_t i = 6 * kHeads * kSize; i < out.numel(); ++i) {
      EXPECT_NE(load_element(data_pointer(out), i, kFloat32), 0) << i;
    }
  }
}

TEST_P(VllmOmni, MaskThatHidesNothingGoesTheDenseWay) {
  const Inputs inputs{.batch = 2, .rows = 5, .keys = 9};
  const AttentionMetadata all_true({.attn_mask = bool_mask({2, 9}, [](std::int64_t) { return true; })});
  EXPECT_TRUE(same_bits(layer()->forward(inputs.query, inputs.key, inputs.value, all_true), inputs.forward()));
  EXPECT_EQ(all_true->mask_description().kind, MaskDescription::Kind::none);
}

// In vLLM-Omni a non-zero number of a two-dimensional mask keeps its key.
TEST_P(VllmOmni, NumbersAreAddedInTwoDimensionsToo) {
  const Inputs inputs{.batch = 1, .rows = 5, .keys = 4};
  Tensor zeros_and_ones = empty({1, 4}, kFloat32);
  Tensor logits = empty({1, 1, 1, 4}, kFloat32);
  for (std::int64_t i = 0; i < 4; ++i) {
    store_element(zeros_and_ones.data_ptr(), i, kFloat32, i < 2 ? 1 : 0);
    store_element(logits.data_ptr(), i, kFloat32, i < 2 ? 1 : 0);
  }
  const Tensor out = inputs.forward({.attn_mask = zeros_and_ones});
  EXPECT_TRUE(same_bits(out, inputs.forward({.attn_mask = logits})));
  const Tensor keeping = inputs.forward({.attn_mask = bool_mask({1, 4}, [](std::int64_t i) { return i < 2; })});
  EXPECT_GT(difference(out, keeping), 0.01);
  EXPECT_EQ(inputs.error({.attn_mask = empty({1, 4}, kInt64)}),
            "attn_mask has dtype int64. Valid dtypes are: bool (true = attend), and float32, float16, bfloat16 (added "
            "to the logits).");
}

TEST_P(VllmOmni, MasksOfOneToFourDimensions) {
  const Inputs inputs{.batch = 2, .rows = 5, .keys = 9};
  const auto seen = [](std::int64_t i) { return i % 3 != 1; };
  for (const Tensor& mask : {bool_mask({9}, seen), bool_mask({2, 9}, seen), bool_mask({kHeads, 5, 9}, seen),
                             bool_mask({2, kHeads, 5, 9}, seen)}) {
    EXPECT_FALSE(std::isnan(difference(inputs.forward({.attn_mask = mask}), inputs.forward()))) << shape_name(mask);
  }
  EXPECT_EQ(inputs.error({.attn_mask = bool_mask({1, 1, 1, 1, 9}, seen)}),
            "attn_mask must have 1 to 4 dimensions, got shape (1, 1, 1, 1, 9).");
}

// --- Precedence: spans, then packed sequences; a mask holds with both.

TEST_P(VllmOmni, MaskHoldsTogetherWithSpans) {
  const Inputs inputs{.batch = 2, .rows = 9, .keys = 9};
  const std::vector<std::vector<Span>> spans = {{{2, 5}}, {{0, 3}, {6, 9}}};  // they differ between the samples
  const auto kept = [](std::int64_t i) { return i % 9 != 1; };
  const auto seen = [&](std::int64_t i) {
    const std::int64_t sample = i / 81;
    const std::int64_t row = i / 9 % 9;
    std::int64_t end = row + 1;
    for (const Span& span : spans[static_cast<std::size_t>(sample)]) {
      if (span.begin <= row && row < span.end) end = span.end;
    }
    return i % 9 < end && kept(i);
  };
  const Tensor out = inputs.forward({.attn_mask = bool_mask({2, 9}, kept), .full_attn_spans = spans});
  EXPECT_LT(difference(out, inputs.forward({.attn_mask = bool_mask({2, 1, 9, 9}, seen)})), 1e-6);
}

TEST_P(VllmOmni, SpansGoBeforePackedSequences) {
  const Inputs inputs{.batch = 1, .rows = 9, .keys = 9};
  const std::vector<std::vector<Span>> spans = {{{2, 5}}};
  const Tensor both = inputs.forward({.full_attn_spans = spans, .extra = packed({0, 4, 9}, {0, 4, 9})});
  EXPECT_TRUE(same_bits(both, inputs.forward({.full_attn_spans = spans})));
  EXPECT_GT(difference(both, inputs.forward({.extra = packed({0, 4, 9}, {0, 4, 9})})), 0.01);
}

// Two entries, packed as one another; and a mask on top.
TEST_P(VllmOmni, PackedSequencesTakeAnyBatchAndMasks) {
  const Inputs inputs{.batch = 2, .rows = 7, .keys = 9};
  const auto kept = [](std::int64_t i) { return i % 9 != 1; };
  const auto own = [](std::int64_t i) { return (i / 9 % 7 < 3) == (i % 9 < 4); };
  const auto extra = packed({0, 3, 7, 10, 14}, {0, 4, 9, 13, 18});
  EXPECT_LT(difference(inputs.forward({.extra = extra}), inputs.forward({.attn_mask = bool_mask({2, 1, 7, 9}, own)})),
            1e-6);
  const Tensor expected =
      inputs.forward({.attn_mask = bool_mask({2, 1, 7, 9}, [&](std::int64_t i) { return own(i) && kept(i); })});
  EXPECT_LT(difference(inputs.forward({.attn_mask = bool_mask({2, 9}, kept), .extra = extra}), expected), 1e-6);
}

// --- Options in `extra`

TEST_P(VllmOmni, MaskModeAndVarlenHintsAreNotAsked) {
  const Inputs inputs{.batch = 2, .rows = 5, .keys = 9};
  const Tensor mask = bool_mask({2, 9}, [](std::int64_t i) { return i % 4 != 1; });
  const Tensor expected = inputs.forward({.attn_mask = mask});
  for (const char* mode : {"none", "padding", "arbitrary", "no such mode"}) {
    const MetadataExtra extra = with(with({}, "attention_mask_mode", tvm::ffi::String(mode)), "npu_attn_varlen", true);
    EXPECT_TRUE(same_bits(inputs.forward({.attn_mask = mask, .extra = extra}), expected)) << mode;
  }
}

TEST_P(VllmOmni, ValidKvLengthIsForEveryBackend) {
  const Inputs inputs{.batch = 1, .rows = 5, .keys = 9};
  const Tensor expected = layer()->forward(inputs.query, first_keys(inputs.key, 6), first_keys(inputs.value, 6));
  EXPECT_LT(difference(inputs.forward({.extra = with({}, "valid_kv_length", 6)}), expected), 1e-6);
  EXPECT_EQ(inputs.error({.extra = with({}, "valid_kv_length", 10)}),
            "valid_kv_length must be within the K/V sequence, got 10 for length 9");
}

// cuDNN's attention refuses a single key; softmax over one is 1.
TEST_P(VllmOmni, OneKeyIsItsValue) {
  const Inputs inputs{.batch = 1, .rows = 3, .keys = 1};
  const Tensor out = inputs.forward();
  for (std::int64_t row = 0; row < 3; ++row) {
    const Tensor here =
        wrap(static_cast<float*>(out.data_ptr()) + row * kHeads * kSize, {1, 1, kHeads, kSize}, kFloat32);
    EXPECT_LT(difference(here, inputs.value), 1e-6);
  }
}

// --- Determinism: on every path, and without asking.

TEST_P(VllmOmni, EveryPathIsDeterministic) {
  const Inputs inputs{.batch = 2, .rows = 150, .keys = 150};
  const AttentionMetadataFields paths[] = {
      {},
      {.attn_mask = bool_mask({2, 150}, [](std::int64_t i) { return i % 7 != 1; })},
      {.full_attn_spans = std::vector<std::vector<Span>>{{{10, 90}}}},
      {.extra = packed({0, 70, 150}, {0, 70, 150})},
  };
  for (const AttentionMetadataFields& fields : paths) {
    set_num_threads(1);
    const Tensor expected = inputs.forward(fields);
    for (const int threads : {1, 3}) {
      set_num_threads(threads);
      EXPECT_TRUE(same_bits(inputs.forward(fields), expected)) << threads << " threads";
    }
  }
}

// --- Not here yet

TEST_P(VllmOmni, Fp8KvIsRefused) {
  const Inputs inputs{.batch = 1, .rows = 5, .keys = 9};
  EXPECT_EQ(inputs.error({.extra = with({}, "kv_cache_dtype", tvm::ffi::String("fp8"))}),
            "Attention backend " + backend()->get_name() +
                " does not support kv_cache_dtype='fp8' on cpu. Select a compatible backend or set "
                "diffusion_kv_cache_dtype='auto'.");
  EXPECT_EQ(inputs.error({.extra = with({}, "kv_cache_dtype", tvm::ffi::String("mxfp4"))}),
            "kv_cache_dtype is 'mxfp4'. Valid values are: 'auto', 'fp8'");
  EXPECT_EQ(inputs.error({.extra = with({}, "kv_cache_dtype", 8)}),
            "kv_cache_dtype is 8. Valid values are: 'auto', 'fp8'");
}

class VllmOmniNotHereYet : public testing::RegistryTest {};

TEST_F(VllmOmniNotHereYet, LaterMembersAreUnknownUntilDefined) {
  for (const char* name : {"FLASH_ATTN_HUB", "FLASH_ATTN_3_HUB", "TRTLLM_ATTN", "FASTVIDEO_VSA", "RAINFUSION_ATTN",
                           "AITER_QUANT_ATTN", "SOL_ATTN", "SPARGE_ATTN", "SPARSE_ATTN", "B12X", "VDNH3"}) {
    testing::expect_contains(error_text<UnknownBackendError>([&] { Enum::from_name(name); }),
                             {std::string("Unknown diffusion attention backend: '") + name + "'. Valid options are: "});
  }
  EXPECT_EQ(Enum::define("CUSTOM_ATTN").value(), "") << "upstream's name on branches for what is CUSTOM here";
}

TEST_F(VllmOmniNotHereYet, OptionsOfBackendsThatAreNotHere) {
  for (const std::string key : {"fastvideo_vsa_topk", "block_sparse", "skip_calibration"}) {
    EXPECT_EQ(error_text<ConfigError>([&] {
                AttentionConfig::from_json(R"({"default": {"backend": "flash_attn", ")" + key + R"(": 1}})");
              }),
              key + " belongs to a backend that ditattn does not have, but backend=FLASH_ATTN. Remove it.");
  }
}

// --- Registry and selection

class VllmOmniSelection : public testing::RegistryTest {};

TEST_F(VllmOmniSelection, PathWithoutADotIsItsOwnModule) {
  register_diffusion_backend(Enum::CUSTOM, "nodot");
  EXPECT_EQ(Enum::CUSTOM.get_path(false), "nodot");
}

TEST_F(VllmOmniSelection, UnknownHeadSizeIsMinusOne) {
  const ScopedEnvironment unset(kVariable, nullptr);
  static_assert(kHeadSizeUnknown == -1);
  EXPECT_EQ(get_attn_backend_for_role("self", -1).backend, get_attn_backend_for_role("self").backend);
}

// vLLM-Omni reads the variable once, when it builds its configuration.
TEST_F(VllmOmniSelection, EnvironmentIsReadAtEachResolution) {
  const ScopedEnvironment unset(kVariable, nullptr);
  EXPECT_EQ(get_attn_backend_for_role("self", 64).member, Enum::FLASH_ATTN);
  const ScopedEnvironment variable(kVariable, "Torch_Sdpa");
  const Selection filled = get_attn_backend_for_role("self", 64);
  EXPECT_EQ(filled.member, Enum::TORCH_SDPA);
  EXPECT_EQ(filled.source, "attention_config.default (DIFFUSION_ATTENTION_BACKEND)");
}

// Members of their own, for each text is logged once in a process.
TEST_F(VllmOmniSelection, LogWithoutARole) {
  const std::string name = testing::unused("LOGGED_ATTN");
  Enum::define(name, Enum::TORCH_SDPA.value());
  const testing::LogRecorder log;
  get_attn_backend_for_role("", 64, config_from_flags({.backend = name}));
  EXPECT_EQ(log.of(LogLevel::info), std::vector<std::string>{"Resolved diffusion attention backend '" + name +
                                                             "' for role=None via attention_config.default"});
}

TEST_F(VllmOmniSelection, LogLeavesTheCategoryToTheSource) {
  const std::string name = testing::unused("CATEGORY_ATTN");
  Enum::define(name, Enum::TORCH_SDPA.value());
  const testing::LogRecorder log;
  const AttentionConfig config = AttentionConfig::from_json(R"({"per_role": {"cat": ")" + name + R"("}})");
  get_attn_backend_for_role("x", 64, config, "cat");
  EXPECT_EQ(log.of(LogLevel::info),
            std::vector<std::string>{"Resolved diffusion attention backend '" + name +
                                     "' for role='x' via "
                                     "attention_config.per_role['cat'] (role_category fallback)"});
}

TEST_F(VllmOmniSelection, KeysOfTheEnginesYamlAreNoConfiguration) {
  EXPECT_EQ(
      error_text<ConfigError>([] { AttentionConfig::from_json(R"({"diffusion_attention_backend": "flash_attn"})"); }),
      "Unknown key 'diffusion_attention_backend' in AttentionConfig. Valid keys are: default, per_role");
}

}  // namespace
}  // namespace ditattn
