// What each backend takes and refuses: one test per row of the table, named after its member. A backend that is not
// here is skipped, with its reason; tests/conformance has the numbers.

#include <gtest/gtest.h>

#include <optional>

#include "ditattn/ditattn.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;
using testing::expect_contains;

struct Row {
  Enum member;
  std::vector<std::int64_t> takes_sizes;
  std::vector<std::int64_t> refuses_sizes;
  std::vector<MaskKind> takes_masks;
  std::vector<MaskKind> refuses_masks;
  bool spans = false;
  bool packed = false;
  bool joint = false;
  CausalAlignment alignment = CausalAlignment::bottom_right;
};

class ContractCapability : public ::testing::Test {
 protected:
  static void check(const Row& row) {
    BackendClass backend;
    try {
      backend = row.member.get_class();
      backend->validate_available();
    } catch (const ImportError& error) {
      GTEST_SKIP() << row.member.name() << " cannot run here: " << error.message();
    }
    const Capabilities& can = backend->capabilities();
    Problem problem{.seq_q = 8, .seq_kv = 8, .head_size = 64, .dtype = can.dtypes.at(0)};
    if (can.devices.at(0) == "cuda") problem.device = {kDLCUDA, 0};
    const auto takes = [&](const Problem& asked) {
      EXPECT_TRUE(backend->explain(asked)) << backend->explain(asked).text();
    };
    const auto refuses = [&](const Problem& asked, const std::string& value) {
      expect_contains(backend->explain(asked).text(), {value});
    };
    const auto with = [&](auto Problem::*field, auto value) {
      Problem changed = problem;
      changed.*field = value;
      return changed;
    };

    for (const std::int64_t size : row.takes_sizes) {
      EXPECT_TRUE(backend->supports_head_size(size)) << size;
      takes(with(&Problem::head_size, size));
    }
    for (const std::int64_t size : row.refuses_sizes) {
      EXPECT_FALSE(backend->supports_head_size(size)) << size;
      refuses(with(&Problem::head_size, size), "head_size=" + std::to_string(size));
    }
    for (const MaskKind mask : row.takes_masks) takes(with(&Problem::mask, mask));
    for (const MaskKind mask : row.refuses_masks) refuses(with(&Problem::mask, mask), "mask");
    takes(with(&Problem::num_heads, std::int64_t{6}));  // GQA: of one K/V head
    takes(with(&Problem::lse, true));
    takes(with(&Problem::causal, true));
    if (row.spans) takes(with(&Problem::spans, true));
    if (row.packed) takes(with(&Problem::packed, true));
    if (row.joint) takes(with(&Problem::joint, true));
    EXPECT_EQ(can.causal_alignment, row.alignment);
    EXPECT_EQ(backend->supports_piecewise_spans(), can.has_mask("spans"));
    EXPECT_TRUE(backend->supports_attention_mask());
  }
};

constexpr MaskKind kPadding = MaskKind::padding;
constexpr MaskKind kBoolean = MaskKind::boolean;
constexpr MaskKind kAdditive = MaskKind::additive;

TEST_F(ContractCapability, FLASH_ATTN) {
  check({.member = Enum::FLASH_ATTN,
         .takes_sizes = {1, 3, 64, 72, 80, 128, 256},
         .refuses_sizes = {},
         .takes_masks = {kPadding, kBoolean, kAdditive},
         .refuses_masks = {},
         .spans = true,
         .packed = true,
         .joint = true});
}

TEST_F(ContractCapability, FLASH_ATTN_AnyHeadSizeOnTheCpu) {
  const BackendClass backend = Enum::FLASH_ATTN.get_class();
  EXPECT_TRUE(backend->get_supported_head_sizes().empty());
  EXPECT_TRUE(backend->explain({.head_size = 1000}));
}

TEST_F(ContractCapability, TORCH_SDPA) {
  check({.member = Enum::TORCH_SDPA,
         .takes_sizes = {1, 3, 64, 72, 128, 256, 512},
         .refuses_sizes = {},
         .takes_masks = {kPadding, kBoolean, kAdditive},
         .refuses_masks = {},
         .joint = true,
         .alignment = CausalAlignment::top_left});
}

TEST_F(ContractCapability, CUDNN_ATTN) {
  check({.member = Enum::CUDNN_ATTN,
         .takes_sizes = {8, 40, 64, 72, 128, 256},
         .refuses_sizes = {1, 20, 63, 264, 512},
         .takes_masks = {kPadding, kBoolean, kAdditive},
         .refuses_masks = {},
         .packed = true,
         .joint = true,
         .alignment = CausalAlignment::top_left});
}

TEST_F(ContractCapability, FLASHINFER_ATTN) {
  check({.member = Enum::FLASHINFER_ATTN,
         .takes_sizes = {64, 128, 256},
         .refuses_sizes = {32, 72, 96, 192},
         .takes_masks = {kPadding, kBoolean},
         .refuses_masks = {kAdditive},
         .packed = true,
         .joint = true});
}

TEST_F(ContractCapability, SAGE_ATTN) {
  check({.member = Enum::SAGE_ATTN,
         .takes_sizes = {1, 40, 64, 72, 80, 128, 160, 256},
         .refuses_sizes = {257, 512},
         .takes_masks = {kPadding},
         .refuses_masks = {kBoolean, kAdditive},
         .packed = true});
}

TEST_F(ContractCapability, SAGE_ATTN_3) {
  check({.member = Enum::SAGE_ATTN_3,
         .takes_sizes = {1, 40, 64, 72, 96, 128},
         .refuses_sizes = {257, 512},
         .takes_masks = {kPadding},
         .refuses_masks = {kBoolean, kAdditive},
         .spans = true,
         .packed = true,
         .joint = true});
}

TEST_F(ContractCapability, SAGE_ATTN_3_EmulatedOnTheCpuToHeadSize256) {
  const BackendClass backend = Enum::SAGE_ATTN_3.get_class();
  expect_contains(backend->capabilities().engine, {"emulated NVFP4"});
  for (const std::int64_t size : {129, 160, 256}) {
    const Verdict verdict = backend->explain({.head_size = size});
    EXPECT_TRUE(verdict) << verdict.text();
  }
}

}  // namespace
}  // namespace ditattn
