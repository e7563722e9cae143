#include "ditattn/problem.hpp"

#include <gtest/gtest.h>

#include "ditattn/errors.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

Capabilities everything() {
  return {.engine = "any",
          .devices = {"cpu"},
          .dtypes = {kFloat32, kBFloat16},
          .head_sizes = {},
          .masks = {"padding", "bool", "additive"},
          .gqa = true,
          .causal = true,
          .lse = true};
}

// The one reason against `problem`.
std::string reason(const Capabilities& can, const Problem& problem) {
  const Verdict verdict = check_capabilities("TOY", can, problem);
  EXPECT_EQ(verdict.reasons.size(), 1U) << verdict.text();
  return verdict.text();
}

TEST(MaskKindName, IsTheCapabilitysName) {
  EXPECT_STREQ(mask_kind_name(MaskKind::none), "none");
  EXPECT_STREQ(mask_kind_name(MaskKind::padding), "padding");
  EXPECT_STREQ(mask_kind_name(MaskKind::boolean), "bool");
  EXPECT_STREQ(mask_kind_name(MaskKind::additive), "additive");
}

TEST(MaskKindName, IsReadAgain) {
  for (const MaskKind kind : {MaskKind::none, MaskKind::padding, MaskKind::boolean, MaskKind::additive}) {
    EXPECT_EQ(parse_mask_kind(mask_kind_name(kind)), kind);
  }
  for (const char* name : {"dense", "", "Bool", "none "}) {
    EXPECT_EQ(testing::error_text<ValueError>([&] { parse_mask_kind(name); }),
              std::string("mask is '") + name + "'. Valid values are: none, padding, bool, additive");
  }
}

TEST(Describe, LeavesOutWhatIsAsByDefault) {
  EXPECT_EQ(describe({.batch = 2, .num_heads = 24, .num_kv_heads = 24, .seq_q = 512, .seq_kv = 77, .head_size = 64}),
            "B=2 H=24 Sq=512 Skv=77 D=64, float32 on cpu");
  EXPECT_EQ(describe({.num_heads = 24,
                      .num_kv_heads = 8,
                      .dtype = kBFloat16,
                      .device = {kDLCUDA, 1},
                      .mask = MaskKind::boolean,
                      .causal = true,
                      .lse = true,
                      .packed = true,
                      .joint = true,
                      .spans = true,
                      .fp8_kv = true,
                      .alignment = 4}),
            "B=1 H=24 Hkv=8 Sq=1 Skv=1 D=1, bfloat16 on cuda:1, mask bool, causal, LSE, joint text, packed sequences, "
            "spans, FP8 K and V, aligned to 4 bytes");
  EXPECT_EQ(describe({.alignment = 0}), "B=1 H=1 Sq=1 Skv=1 D=1, float32 on cpu, a negative stride");
}

TEST(HeadSizes, AnyTakesEverySizeFromOne) {
  const HeadSizes sizes;
  EXPECT_TRUE(sizes.any());
  EXPECT_TRUE(sizes.contains(1));
  EXPECT_TRUE(sizes.contains(4096));
  EXPECT_FALSE(sizes.contains(0));
  EXPECT_FALSE(sizes.contains(-8));
  EXPECT_EQ(sizes.describe(), "any");
}

TEST(HeadSizes, ListTakesItsOwnOnly) {
  const HeadSizes sizes{.list = {64, 128, 256}};
  EXPECT_FALSE(sizes.any());
  EXPECT_TRUE(sizes.contains(128));
  EXPECT_FALSE(sizes.contains(96));
  EXPECT_FALSE(sizes.contains(512));
  EXPECT_EQ(sizes.describe(), "64, 128, 256");
}

TEST(HeadSizes, RangeTakesItsMultiples) {
  const HeadSizes sizes{.list = {}, .min = 8, .max = 256, .multiple = 8};
  EXPECT_TRUE(sizes.contains(8));
  EXPECT_TRUE(sizes.contains(256));
  EXPECT_FALSE(sizes.contains(4));
  EXPECT_FALSE(sizes.contains(12));
  EXPECT_FALSE(sizes.contains(264));
  EXPECT_EQ(sizes.describe(), "8 to 256 in multiples of 8");
  EXPECT_EQ((HeadSizes{.list = {}, .min = 1, .max = 256}.describe()), "1 to 256");
  EXPECT_EQ((HeadSizes{.list = {}, .min = 16}.describe()), "from 16");
}

TEST(HeadSizes, NoStepIsEverySize) {
  const HeadSizes sizes{.list = {}, .min = 3, .max = 5, .multiple = 0};
  EXPECT_TRUE(sizes.contains(4));
  EXPECT_FALSE(sizes.contains(6));
  EXPECT_EQ(sizes.describe(), "3 to 5");
}

TEST(CheckCapabilities, YesHasNoReasons) {
  const Verdict verdict = check_capabilities("TOY", everything(), {.num_heads = 4, .num_kv_heads = 2, .causal = true});
  EXPECT_TRUE(verdict);
  EXPECT_EQ(verdict.text(), "");
}

TEST(CheckCapabilities, Device) {
  EXPECT_EQ(reason(everything(), {.device = {kDLCUDA, 1}}),
            "TOY does not support device=cuda:1. Supported devices: cpu.");
}

TEST(CheckCapabilities, Dtype) {
  EXPECT_EQ(reason(everything(), {.dtype = kFloat64}),
            "TOY does not support dtype=float64. Supported dtypes: float32, bfloat16.");
}

TEST(CheckCapabilities, HeadSize) {
  Capabilities can = everything();
  can.head_sizes.list = {64, 128};
  EXPECT_EQ(reason(can, {.head_size = 96}), "TOY does not support head_size=96. Supported head sizes: 64, 128.");
}

TEST(CheckCapabilities, NoMaskAtAll) {
  Capabilities can = everything();
  can.masks = {};
  EXPECT_EQ(reason(can, {.mask = MaskKind::padding}), "TOY does not support attn_mask. Select a mask-capable backend.");
  EXPECT_TRUE(check_capabilities("TOY", can, {.mask = MaskKind::none}));
}

TEST(CheckCapabilities, MaskOfAnotherKind) {
  Capabilities can = everything();
  can.masks = {"padding", "bool"};
  EXPECT_EQ(reason(can, {.mask = MaskKind::additive}),
            "TOY does not support a mask of kind additive. Supported kinds: padding, bool.");
}

TEST(CheckCapabilities, GroupedHeads) {
  Capabilities can = everything();
  can.gqa = false;
  EXPECT_EQ(reason(can, {.num_heads = 8, .num_kv_heads = 2}),
            "TOY does not support GQA/MQA (q_heads=8, kv_heads=2). Select a GQA-capable backend.");
}

TEST(CheckCapabilities, CausalAndLse) {
  Capabilities can = everything();
  can.causal = false;
  can.lse = false;
  EXPECT_EQ(reason(can, {.causal = true}), "TOY does not support causal=True.");
  EXPECT_EQ(reason(can, {.lse = true}), "TOY does not return the log-sum-exp.");
}

TEST(CheckCapabilities, EveryReasonIsGiven) {
  const Problem worst{.num_heads = 4,
                      .num_kv_heads = 2,
                      .head_size = 64,
                      .dtype = kInt32,
                      .device = {kDLCUDA, 0},
                      .mask = MaskKind::boolean,
                      .causal = true,
                      .lse = true};
  Capabilities nothing;
  nothing.head_sizes.max = 8;
  const Verdict verdict = check_capabilities("TOY", nothing, worst);
  EXPECT_FALSE(verdict);
  EXPECT_EQ(verdict.reasons.size(), 7U) << verdict.text();
  EXPECT_EQ((Verdict{{"a", "b"}}).text(), "a; b");
}

}  // namespace
}  // namespace ditattn
