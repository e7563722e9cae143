// What `forward` refuses about metadata, before it writes: one test per message. The ranges themselves are tested in
// core/metadata_test.cpp; here, that a call meets their errors.

#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <optional>

#include "tests/unit/packed_metadata.hpp"
#include "tests/unit/testing.hpp"
#include "tests/unit/toy_backend.hpp"

namespace ditattn {
namespace {

using testing::packed;
using testing::with;

constexpr DLDevice kCuda{kDLCUDA, 0};

Capabilities all_but_fp8() {
  Capabilities can = testing::toy_capabilities();
  can.masks.emplace_back("spans");
  can.packed = can.joint = true;
  return can;
}

// A good call: 2 entries, 5 queries of 4 heads, 7 keys of 2 heads; text of 3 queries and 2 keys is at hand. Each test
// gives one thing that is wrong.
struct Call {
  Tensor query = testing::counting({2, 5, 4, 8});
  Tensor key = testing::counting({2, 7, 2, 8});
  Tensor value = testing::counting({2, 7, 2, 8});
  Capabilities can = all_but_fp8();

  [[nodiscard]] Tensor forward(const AttentionMetadataFields& fields, const ForwardOutputs& outputs = {}) const {
    const auto backend = std::make_shared<testing::ToyBackend>("TOY", 1, can);
    return backend->make({.num_heads = 4, .head_size = 8, .num_kv_heads = 2})
        ->forward(query, key, value, AttentionMetadata(fields), outputs);
  }
  // The error's text, once it is sure that nothing was written.
  [[nodiscard]] std::string error(const AttentionMetadataFields& fields) const {
    const std::int64_t rows = 5 + (fields.joint_query.has_value() && fields.joint_query.value().ndim() == 4
                                       ? fields.joint_query.value().size(1)
                                       : 0);
    const Tensor out = testing::counting({2, rows, 4, 8}, kFloat32, 1000);
    const Tensor lse = testing::counting({2, 4, rows}, kFloat32, 1000);
    const std::string text = testing::error_text<ValueError>([&] { return forward(fields, {.out = out, .lse = lse}); });
    for (const Tensor& tensor : {out, lse}) {
      for (std::int64_t i = 0; i < tensor.numel(); ++i) {
        const double element = load_element(data_pointer(tensor), i, kFloat32);
        EXPECT_EQ(element, static_cast<double>(1000 + i)) << "written to, though refused: " << text;
      }
    }
    return text;
  }
};

AttentionMetadataFields joint() {
  return {.joint_query = testing::counting({2, 3, 4, 8}),
          .joint_key = testing::counting({2, 2, 2, 8}),
          .joint_value = testing::counting({2, 2, 2, 8})};
}

// `joint()` with a part of it changed.
AttentionMetadataFields joint_with(const std::function<void(AttentionMetadataFields&)>& change) {
  AttentionMetadataFields fields = joint();
  change(fields);
  return fields;
}

// Neither all true nor a prefix, so that it is a mask to every backend.
Tensor mask(std::initializer_list<std::int64_t> shape) {
  Tensor result = empty(shape, kBool);
  for (std::int64_t i = 0; i < result.numel(); ++i) store_element(data_pointer(result), i, kBool, i % 2 == 1);
  return result;
}

TEST(CheckMetadata, GoodCallsPassAndWrite) {
  const Call call;
  const Tensor out = testing::counting({2, 5, 4, 8}, kFloat32, 1000);
  EXPECT_TRUE(call.forward({}, {.out = out}).same_as(out));
  EXPECT_LT(load_element(data_pointer(out), 0, kFloat32), 1000) << "so the checks for untouched outputs can fail";
  EXPECT_EQ(shape_name(call.forward(joint())), "(2, 8, 4, 8)");
  EXPECT_EQ(shape_name(call.forward({.extra = packed({0, 2, 5}, {0, 3, 7})})), "(2, 5, 4, 8)");
  EXPECT_EQ(shape_name(call.forward({.full_attn_spans = std::vector<std::vector<Span>>{{{0, 7}}}})), "(2, 5, 4, 8)");
}

TEST(CheckMetadata, UnknownExtraKeysAreIgnored) {
  MetadataExtra extra = with(with({}, "attention_mask_mode", "padding"), "npu_attn_varlen", nullptr);
  extra.Set("cu_seqlens", testing::cu_seqlens({9, 1}));
  EXPECT_NO_THROW(Call().forward({.extra = extra}));
}

// --- Joint tokens

TEST(CheckJoint, AllThreeOrNone) {
  const std::string what = "joint_query, joint_key, and joint_value should be None or not None simultaneously.";
  for (int given = 1; given < 7; ++given) {
    AttentionMetadataFields fields;
    if ((given & 1) != 0) fields.joint_query = joint().joint_query;
    if ((given & 2) != 0) fields.joint_key = joint().joint_key;
    if ((given & 4) != 0) fields.joint_value = joint().joint_value;
    EXPECT_EQ(Call().error(fields), what) << "given: " << given;
  }
}

TEST(CheckJoint, Strategy) {
  const Call call;
  EXPECT_EQ(call.error(joint_with([](auto& fields) { fields.joint_strategy = "middle"; })),
            "joint_strategy: middle not supported. supported joint strategy: ['front', 'rear']");
  EXPECT_EQ(call.error({.joint_strategy = "FRONT"}),
            "joint_strategy: FRONT not supported. supported joint strategy: ['front', 'rear']");
  EXPECT_NO_THROW(call.forward(joint_with([](auto& fields) { fields.joint_strategy = "rear"; })));
}

TEST(CheckJoint, DtypeAndDeviceAreTheImages) {
  const Call call;
  EXPECT_EQ(call.error(joint_with([](auto& fields) {
    fields.joint_query = empty({2, 3, 4, 8}, kBFloat16);
  })),
            "joint_query is bfloat16 on cpu, expected float32 on cpu like the image's.");
  EXPECT_EQ(call.error(joint_with([](auto& fields) {
    fields.joint_value = wrap(data_pointer(fields.joint_value.value()), {2, 2, 2, 8}, kFloat32, {}, kCuda);
  })),
            "joint_value is float32 on cuda:0, expected float32 on cpu like the image's.");
}

TEST(CheckJoint, SizesAreTheImages) {
  const auto error = [](auto member, std::initializer_list<std::int64_t> shape) {
    return Call().error(joint_with([&](auto& fields) { fields.*member = empty(shape, kFloat32); }));
  };
  using Fields = AttentionMetadataFields;
  EXPECT_EQ(error(&Fields::joint_query, {2, 3, 32}),
            "joint_query must have 4 dimensions (batch, tokens, heads, head_size), got shape (2, 3, 32).");
  EXPECT_EQ(error(&Fields::joint_query, {1, 3, 4, 8}), "joint_query has batch=1, expected 2 (shape (1, 3, 4, 8)).");
  EXPECT_EQ(error(&Fields::joint_query, {2, 3, 2, 8}), "joint_query has heads=2, expected 4 (shape (2, 3, 2, 8)).");
  EXPECT_EQ(error(&Fields::joint_query, {2, 3, 4, 9}), "joint_query has head_size=9, expected 8 (shape (2, 3, 4, 9)).");
  EXPECT_EQ(error(&Fields::joint_key, {3, 2, 2, 8}), "joint_key has batch=3, expected 2 (shape (3, 2, 2, 8)).");
  EXPECT_EQ(error(&Fields::joint_key, {2, 2, 4, 8}), "joint_key has heads=4, expected 2 (shape (2, 2, 4, 8)).");
  EXPECT_EQ(error(&Fields::joint_value, {2, 2, 2, 7}), "joint_value has head_size=7, expected 8 (shape (2, 2, 2, 7)).");
  EXPECT_EQ(error(&Fields::joint_value, {2, 3, 2, 8}), "joint_value has tokens=3, expected 2 (shape (2, 3, 2, 8)).");
}

TEST(CheckJoint, MaskNeedsTokens) {
  EXPECT_EQ(Call().error({.joint_attn_mask = mask({2, 2})}),
            "joint_attn_mask needs joint_query, joint_key and joint_value.");
}

TEST(CheckJoint, JoinedMaskLeavesNoRoomForAJointOne) {
  EXPECT_EQ(Call().error(joint_with([](auto& fields) {
    fields.attn_mask = mask({2, 9});
    fields.joint_attn_mask = mask({2, 2});
  })),
            "attn_mask of shape (2, 9) spans the joined keys already: joint_attn_mask must be left out.");
}

TEST(CheckJoint, ShapesOfMasks) {
  const Call call;
  EXPECT_EQ(call.error(joint_with([](auto& fields) {
    fields.attn_mask = mask({2, 8});
  })),
            "attn_mask of shape (2, 8) does not broadcast to (batch, heads, queries, keys) = (2, 4, 5, 7), nor to the "
            "joined (2, 4, 8, 9). Two dimensions are (batch, keys); give a (queries, keys) mask as (1, 1, queries, "
            "keys).");
  EXPECT_EQ(
      call.error(joint_with([](auto& fields) {
        fields.attn_mask = mask({1, 1, 6, 7});
      })),
      "attn_mask of shape (1, 1, 6, 7) does not broadcast to (batch, heads, queries, keys) = (2, 4, 5, 7), nor to "
      "the joined (2, 4, 8, 9).");
  EXPECT_EQ(
      call.error(joint_with([](auto& fields) {
        fields.joint_attn_mask = mask({1, 1, 5, 2});
      })),
      "joint_attn_mask of shape (1, 1, 5, 2) does not broadcast to (batch, heads, queries, keys) = (2, 4, 8, 2).");
}

TEST(CheckJoint, DtypeDeviceAndRankOfTheJointMask) {
  const auto error = [](const Tensor& tensor) {
    return Call().error(joint_with([&](auto& fields) { fields.joint_attn_mask = tensor; }));
  };
  std::array<bool, 4> data = {};
  EXPECT_EQ(error(empty({2, 2}, kInt32)),
            "joint_attn_mask has dtype int32. Valid dtypes are: bool (true = attend), and float32, float16, bfloat16 "
            "(added to the logits).");
  EXPECT_EQ(error(wrap(data.data(), {2, 2}, kBool, {}, kCuda)), "joint_attn_mask is on cuda:0, query on cpu.");
  EXPECT_EQ(error(empty({1, 1, 1, 1, 2}, kBool)),
            "joint_attn_mask must have 1 to 4 dimensions, got shape (1, 1, 1, 1, 2).");
}

TEST(CheckJoint, MasksThatFit) {
  for (const Tensor& image :
       {mask({2, 7}), mask({2, 9}), mask({1, 1, 5, 7}), mask({1, 4, 8, 7}), mask({2, 1, 5, 9}), mask({1, 1, 8, 9})}) {
    EXPECT_NO_THROW(Call().forward(joint_with([&](auto& fields) { fields.attn_mask = image; }))) << shape_name(image);
  }
  for (const Tensor& text : {mask({2, 2}), mask({1, 2}), mask({2}), mask({1, 4, 8, 2}), mask({2, 1, 1, 2})}) {
    EXPECT_NO_THROW(Call().forward(joint_with([&](auto& fields) { fields.joint_attn_mask = text; })))
        << shape_name(text);
  }
}

// It hides the same keys from all of the image's rows, and none from the text's.
TEST(CheckJoint, AMaskOfTheImagesRowsIsNoPaddingMask) {
  Call call;
  call.can.masks = {"padding"};
  AttentionMetadataFields fields = joint();
  const auto hide_from_third_on = [](std::initializer_list<std::int64_t> shape) {
    const Tensor mask = empty(shape, kBool);
    for (std::int64_t i = 0; i < mask.numel(); ++i) store_element(mask.data_ptr(), i, kBool, i % 7 < 3 ? 1 : 0);
    return mask;
  };
  fields.attn_mask = hide_from_third_on({1, 1, 5, 7});
  testing::expect_contains(call.error(fields), {"TOY does not support a mask of kind bool"});
  fields.attn_mask = hide_from_third_on({1, 1, 8, 7});
  EXPECT_TRUE(call.forward(fields).defined());
  fields.attn_mask = hide_from_third_on({1, 1, 1, 7});
  EXPECT_TRUE(call.forward(fields).defined());
}

TEST(CheckJoint, OutputHasTheTextsRowsToo) {
  EXPECT_EQ(testing::error_text<ValueError>([&] {
              return Call().forward(joint(), {.out = empty({2, 5, 4, 8}, kFloat32)});
            }),
            "out must have shape (2, 8, 4, 8), got (2, 5, 4, 8).");
}

// --- Packed sequences, spans, prefixes

TEST(CheckPacked, ErrorsOfOffsetsReachTheCaller) {
  const Call call;
  EXPECT_EQ(call.error({.extra = packed({0, 3, 2, 5}, {0, 7})}),
            "cu_seqlens_q must start at 0 and ascend, got [0, 3, 2, 5].");
  EXPECT_EQ(call.error({.extra = packed({0, 5}, {0, 6})}),
            "cu_seqlens_k ends at 6, expected 7 (the tokens of a batch entry) or 14 (of the whole batch).");
  EXPECT_EQ(call.error({.extra = packed({0, 5}, {0, 7}, 4)}),
            "max_seqlen_q is 4, but the longest sequence has 5 tokens.");
  EXPECT_EQ(call.error({.extra = with({}, "cu_seqlens_q", testing::cu_seqlens({0, 5}))}),
            "Incomplete packed FlashAttention metadata; missing ['cu_seqlens_k', 'max_seqlen_q', 'max_seqlen_k']");
}

TEST(CheckPacked, NotWithJointTokens) {
  EXPECT_EQ(Call().error(joint_with([](auto& fields) {
    fields.extra = packed({0, 8}, {0, 9});
  })),
            "Packed sequences (cu_seqlens) and joint text tokens cannot be combined: put the text into the packed "
            "tensors.");
}

TEST(CheckSpans, ErrorsOfSpansReachTheCaller) {
  using Spans = std::vector<std::vector<Span>>;
  const Call call;
  EXPECT_EQ(call.error({.full_attn_spans = Spans{{{4, 8}}}}),
            "full_attn_spans has [4, 8), which is not a non-empty span within [0, 7).");
  EXPECT_EQ(call.error({.full_attn_spans = Spans{{}, {}, {}}}),
            "full_attn_spans has 3 samples, the batch 2. Give one list per sample, or one for all.");
  EXPECT_EQ(call.error({.full_attn_spans = Spans{{}}, .query_ranges = {{0, 4, 0}}}),
            "query_ranges must cover local query contiguously, got 4 of 5 rows.");
  EXPECT_EQ(call.error({.query_ranges = {{0, 5, 0}}}),
            "query_ranges place rows for full_attn_spans, which are missing.");
}

TEST(CheckSpans, AreInJoinedCoordinates) {
  AttentionMetadataFields fields = joint();
  fields.full_attn_spans = std::vector<std::vector<Span>>{{{4, 9}}};
  EXPECT_NO_THROW(Call().forward(fields)) << "7 image keys and 2 of the text";
  fields.extra = with({}, "valid_kv_length", 6);
  EXPECT_EQ(Call().error(fields), "full_attn_spans has [4, 9), which is not a non-empty span within [0, 8).");
}

TEST(CheckValidKvLength, WithinTheKeys) {
  const Call call;
  for (const tvm::ffi::Any& good : {tvm::ffi::Any(0), tvm::ffi::Any(7), tvm::ffi::Any(nullptr)}) {
    EXPECT_NO_THROW(call.forward({.extra = with({}, "valid_kv_length", good)}));
  }
  EXPECT_EQ(call.error({.extra = with({}, "valid_kv_length", 8)}),
            "valid_kv_length must be within the K/V sequence, got 8 for length 7");
  EXPECT_EQ(call.error({.extra = with({}, "valid_kv_length", -1)}),
            "valid_kv_length must be within the K/V sequence, got -1 for length 7");
  EXPECT_EQ(call.error({.extra = with({}, "valid_kv_length", 3.5)}),
            "valid_kv_length must be within the K/V sequence, got no integer for length 7");
}

TEST(CheckKvCacheDtype, KnownNames) {
  const Call call;
  EXPECT_NO_THROW(call.forward({.extra = with({}, "kv_cache_dtype", "auto")}));
  EXPECT_NO_THROW(call.forward({.extra = with({}, "kv_cache_dtype", nullptr)}));
  EXPECT_EQ(call.error({.extra = with({}, "kv_cache_dtype", "int4")}),
            "kv_cache_dtype is 'int4'. Valid values are: 'auto', 'fp8'");
  EXPECT_EQ(call.error({.extra = with({}, "kv_cache_dtype", 8)}),
            "kv_cache_dtype is 8. Valid values are: 'auto', 'fp8'");
}

// --- What a backend has to declare

TEST(MetadataFeatures, AreRefusedByNameWhereNotDeclared) {
  Call call;
  call.can = testing::toy_capabilities();
  EXPECT_EQ(call.error({.extra = with({}, "kv_cache_dtype", "fp8")}),
            "Attention backend TOY does not support kv_cache_dtype='fp8' on cpu. Select a compatible backend or set "
            "diffusion_kv_cache_dtype='auto'.");
  // Where a back end that would do can be imported, the text goes on to name it.
  testing::expect_contains(call.error(joint()),
                           {"TOY does not support joint text tokens (joint_query, joint_key, joint_value)."});
  testing::expect_contains(call.error({.extra = packed({0, 5}, {0, 7})}),
                           {"TOY does not support packed sequences (cu_seqlens)."});
  testing::expect_contains(call.error({.full_attn_spans = std::vector<std::vector<Span>>{{}}}),
                           {"Attention backend 'TOY' does not support piecewise attention (full_attn_spans"});
}

TEST(MetadataFeatures, ASpannedCallIsNotAPackedOne) {
  Call call;
  call.can.packed = false;
  EXPECT_NO_THROW(
      call.forward({.full_attn_spans = std::vector<std::vector<Span>>{{}}, .extra = packed({0, 5}, {0, 7})}));
}

TEST(MetadataFeatures, DeclaredFp8IsTaken) {
  Call call;
  call.can.fp8_kv = true;
  EXPECT_NO_THROW(call.forward({.extra = with({}, "kv_cache_dtype", "fp8")}));
}

}  // namespace
}  // namespace ditattn
