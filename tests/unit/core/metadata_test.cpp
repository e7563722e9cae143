// Spans and packed sequences: the ranges they come to, worked out by hand here, and every way to give them wrongly.

#include "ditattn/metadata.hpp"

#include <gtest/gtest.h>

#include <array>
#include <barrier>
#include <thread>

#include "tests/unit/packed_metadata.hpp"
#include "tests/unit/testing.hpp"

namespace ditattn {
namespace {

using testing::cu_seqlens;
using testing::packed;
using testing::with;
using Bounds = std::vector<std::int64_t>;
using Spans = std::vector<std::vector<Span>>;

constexpr CausalAlignment kBottomRight = CausalAlignment::bottom_right;
constexpr CausalAlignment kTopLeft = CausalAlignment::top_left;

AttentionMetadata spans(Spans given, std::vector<QueryRange> query_ranges = {}) {
  return AttentionMetadata({.full_attn_spans = std::move(given), .query_ranges = std::move(query_ranges)});
}

AttentionMetadata extra(MetadataExtra given) { return AttentionMetadata({.extra = std::move(given)}); }

void expect_ranges(const AttentionMetadata& metadata, const RangeRequest& request, const Bounds& bounds,
                   std::int64_t batch_stride = 0) {
  const auto ranges = metadata->key_ranges(request);
  ASSERT_NE(ranges, nullptr);
  EXPECT_EQ(ranges->bounds, bounds);
  EXPECT_EQ(ranges->batch_stride, batch_stride);
}

std::string error(const AttentionMetadata& metadata, const RangeRequest& request) {
  return testing::error_text<ValueError>([&] { return metadata->key_ranges(request); });
}

// --- Spans

TEST(SpanRanges, NoSpansAndNoPackingLeaveNoRanges) {
  EXPECT_EQ(AttentionMetadata(AttentionMetadataFields{})->key_ranges({.batch = 1, .rows = 3, .keys = 3}), nullptr);
}

TEST(SpanRanges, RowsInsideASpanSeeItAll) {
  expect_ranges(spans({{{1, 3}, {4, 6}}}), {.batch = 1, .rows = 6, .keys = 6}, {0, 1, 0, 3, 0, 3, 0, 4, 0, 6, 0, 6});
}

TEST(SpanRanges, SpansMayTouch) {
  expect_ranges(spans({{{0, 2}, {2, 4}}}), {.batch = 1, .rows = 4, .keys = 4}, {0, 2, 0, 2, 0, 4, 0, 4});
}

TEST(SpanRanges, AnEmptyListIsFullyCausal) {
  expect_ranges(spans({{}}), {.batch = 3, .rows = 4, .keys = 4}, {0, 1, 0, 2, 0, 3, 0, 4});
  expect_ranges(spans({{}}), {.batch = 1, .rows = 3, .keys = 2}, {0, 1, 0, 2, 0, 2});
}

TEST(SpanRanges, OneListPerSampleOrOneForAll) {
  expect_ranges(spans({{{0, 2}}, {}}), {.batch = 2, .rows = 3, .keys = 3}, {0, 2, 0, 2, 0, 3, 0, 1, 0, 2, 0, 3}, 6);
  expect_ranges(spans({{{0, 2}}}), {.batch = 2, .rows = 3, .keys = 3}, {0, 2, 0, 2, 0, 3});
}

TEST(SpanRanges, QueryRangesPlaceTheRows) {
  const AttentionMetadata metadata = spans({{{5, 8}}}, {{0, 2, 1}, {2, 4, 6}});
  expect_ranges(metadata, {.batch = 1, .rows = 4, .keys = 8}, {0, 2, 0, 3, 0, 8, 0, 8});
}

TEST(SpanRanges, RowsPlacedPastTheKeysSeeThemAll) {
  expect_ranges(spans({{}}, {{0, 1, 3}, {1, 2, 10}}), {.batch = 1, .rows = 2, .keys = 4}, {0, 4, 0, 4});
  expect_ranges(spans({{}}, {{0, 2, INT64_MAX - 2}}), {.batch = 1, .rows = 2, .keys = 4}, {0, 4, 0, 4});
}

TEST(SpanRanges, CausalityAndAlignmentAreInThemAlready) {
  for (CausalAlignment alignment : {kTopLeft, kBottomRight}) {
    expect_ranges(spans({{{1, 3}}}), {.batch = 1, .rows = 2, .keys = 4, .causal = true, .alignment = alignment},
                  {0, 1, 0, 3});
  }
}

TEST(SpanRanges, GoBeforePackedSequences) {
  const AttentionMetadata both({.full_attn_spans = Spans{{}}, .extra = packed({0, 2}, {0, 2})});
  expect_ranges(both, {.batch = 1, .rows = 2, .keys = 2}, {0, 1, 0, 2});
}

TEST(SpanErrors, EachSpan) {
  const RangeRequest request{.batch = 1, .rows = 6, .keys = 6};
  const std::string what = ", which is not a non-empty span within [0, 6).";
  EXPECT_EQ(error(spans({{{2, 2}}}), request), "full_attn_spans has [2, 2)" + what);
  EXPECT_EQ(error(spans({{{3, 1}}}), request), "full_attn_spans has [3, 1)" + what);
  EXPECT_EQ(error(spans({{{-1, 2}}}), request), "full_attn_spans has [-1, 2)" + what);
  EXPECT_EQ(error(spans({{{0, 1}, {4, 7}}}), request), "full_attn_spans has [4, 7)" + what);
}

TEST(SpanErrors, OrderOfSpans) {
  const RangeRequest request{.batch = 2, .rows = 6, .keys = 6};
  EXPECT_EQ(error(spans({{{0, 3}, {2, 5}}}), request),
            "full_attn_spans has [2, 5) after a span that ends at 3: spans must be sorted and not overlap.");
  EXPECT_EQ(error(spans({{}, {{4, 6}, {0, 2}}}), request),
            "full_attn_spans has [0, 2) after a span that ends at 6: spans must be sorted and not overlap.");
}

TEST(SpanErrors, NumberOfSamples) {
  EXPECT_EQ(error(spans({{}, {}}), {.batch = 3, .rows = 1, .keys = 1}),
            "full_attn_spans has 2 samples, the batch 3. Give one list per sample, or one for all.");
  EXPECT_EQ(error(spans({}), {.batch = 3, .rows = 1, .keys = 1}),
            "full_attn_spans has 0 samples, the batch 3. Give one list per sample, or one for all.");
}

TEST(SpanErrors, QueryRanges) {
  const RangeRequest request{.batch = 1, .rows = 4, .keys = 9};
  const std::string what = "query_ranges must cover local query contiguously, got ";
  EXPECT_EQ(error(spans({{}}, {{0, 1, 0}, {2, 4, 2}}), request), what + "(2, 4, 2) where row 1 of 4 was due.");
  EXPECT_EQ(error(spans({{}}, {{0, 3, 0}, {2, 4, 2}}), request), what + "(2, 4, 2) where row 3 of 4 was due.");
  EXPECT_EQ(error(spans({{}}, {{1, 4, 0}}), request), what + "(1, 4, 0) where row 0 of 4 was due.");
  EXPECT_EQ(error(spans({{}}, {{0, 5, 0}}), request), what + "(0, 5, 0) where row 0 of 4 was due.");
  EXPECT_EQ(error(spans({{}}, {{0, -1, 0}}), request), what + "(0, -1, 0) where row 0 of 4 was due.");
  EXPECT_EQ(error(spans({{}}, {{0, 4, -1}}), request), what + "(0, 4, -1) where row 0 of 4 was due.");
  EXPECT_EQ(error(spans({{}}, {{0, 3, 0}}), request), what + "3 of 4 rows.");
  EXPECT_EQ(error(spans({{}}, {{0, 4, INT64_MAX - 1}}), request),
            what + "(0, 4, 9223372036854775806) where row 0 of 4 was due.");
}

// --- Packed sequences

TEST(PackedRanges, EachSequenceSeesItsOwnKeys) {
  expect_ranges(extra(packed({0, 2, 5}, {0, 3, 5})), {.batch = 1, .rows = 5, .keys = 5},
                {0, 3, 0, 3, 3, 5, 3, 5, 3, 5});
}

// The first sequence has a key more than queries, the second one less.
TEST(PackedRanges, CausalWithinEachSequence) {
  const AttentionMetadata metadata = extra(packed({0, 2, 5}, {0, 3, 5}));
  RangeRequest request{.batch = 1, .rows = 5, .keys = 5, .causal = true, .alignment = kBottomRight};
  expect_ranges(metadata, request, {0, 2, 0, 3, 3, 3, 3, 4, 3, 5});
  request.alignment = kTopLeft;
  expect_ranges(metadata, request, {0, 1, 0, 2, 3, 4, 3, 5, 3, 5});
}

TEST(PackedRanges, EmptySequences) {
  const AttentionMetadata metadata = extra(packed({0, 0, 2, 2}, {0, 3, 3, 4}));
  for (bool causal : {false, true}) {
    expect_ranges(metadata, {.batch = 1, .rows = 2, .keys = 4, .causal = causal}, {3, 3, 3, 3});
  }
}

TEST(PackedRanges, OffsetsOfEveryBatchEntry) {
  expect_ranges(extra(packed({0, 1, 3}, {0, 2, 4})), {.batch = 2, .rows = 3, .keys = 4}, {0, 2, 2, 4, 2, 4});
}

TEST(PackedRanges, OffsetsOfTheWholeBatch) {
  const AttentionMetadata metadata = extra(packed({0, 3, 4, 6}, {0, 4, 5, 8}));
  RangeRequest request{.batch = 2, .rows = 3, .keys = 4};
  expect_ranges(metadata, request, {0, 4, 0, 4, 0, 4, 0, 1, 1, 4, 1, 4}, 6);
  request.causal = true;
  expect_ranges(metadata, request, {0, 2, 0, 3, 0, 4, 0, 1, 1, 3, 1, 4}, 6);
  request.alignment = kTopLeft;
  expect_ranges(metadata, request, {0, 1, 0, 2, 0, 3, 0, 1, 1, 2, 1, 3}, 6);
}

TEST(PackedRanges, OffsetsMayBeStrided) {
  const Tensor wide = cu_seqlens({0, 90, 2, 91, 5, 92});
  const Tensor q = wrap(data_pointer(wide), {3}, kInt32, {2});
  expect_ranges(extra(with(packed({0}, {0, 3, 5}), "cu_seqlens_q", q)), {.batch = 1, .rows = 5, .keys = 5},
                {0, 3, 0, 3, 3, 5, 3, 5, 3, 5});
}

TEST(PackedErrors, IncompleteMetadata) {
  MetadataExtra given;
  EXPECT_FALSE(extra(given)->is_packed());
  const RangeRequest request{.batch = 1, .rows = 1, .keys = 1};
  const std::string what = "Incomplete packed FlashAttention metadata; missing ";
  given.Set("max_seqlen_q", 1);
  EXPECT_EQ(error(extra(given), request), what + "['cu_seqlens_q', 'cu_seqlens_k', 'max_seqlen_k']");
  given.Set("cu_seqlens_q", cu_seqlens({0, 1}));
  EXPECT_EQ(error(extra(given), request), what + "['cu_seqlens_k', 'max_seqlen_k']");
  given.Set("cu_seqlens_k", cu_seqlens({0, 1}));
  EXPECT_EQ(error(extra(given), request), what + "['max_seqlen_k']");
  given.Set("max_seqlen_k", 1);
  EXPECT_TRUE(extra(given)->is_packed());
}

TEST(PackedErrors, KindOfOffsets) {
  const RangeRequest request{.batch = 1, .rows = 2, .keys = 2};
  const auto text = [&](const tvm::ffi::Any& value) {
    return error(extra(with(packed({0, 2}, {0, 2}), "cu_seqlens_k", value)), request);
  };
  const std::string what =
      "cu_seqlens_k must be a one-dimensional int32 tensor of at least 2 elements in host or CUDA memory, got ";
  std::array<std::int32_t, 2> data = {0, 2};
  EXPECT_EQ(text(empty({2}, kInt64)), what + "int64 (2,) on cpu.");
  EXPECT_EQ(text(empty({1, 2}, kInt32)), what + "int32 (1, 2) on cpu.");
  EXPECT_EQ(text(cu_seqlens({0})), what + "int32 (1,) on cpu.");
  EXPECT_EQ(text(wrap(data.data(), {2}, kInt32, {}, DLDevice{kDLROCM, 1})), what + "int32 (2,) on rocm:1.");
  EXPECT_EQ(text(2), what + "no tensor.");
  EXPECT_EQ(text(nullptr), what + "no tensor.");
}

TEST(PackedErrors, OffsetsWithoutMemory) {
  std::int32_t number = 0;
  const auto error = [](const Tensor& offsets) {
    const AttentionMetadata metadata({.extra = with(packed({0, 4}, {0, 6}), "cu_seqlens_q", offsets)});
    return testing::error_text<ValueError>([&] { metadata->key_ranges({.batch = 1, .rows = 4, .keys = 6}); });
  };
  EXPECT_EQ(error(wrap(nullptr, {2}, kInt32)), "cu_seqlens_q of shape (2,) has a null data pointer.");
  EXPECT_EQ(error(wrap(&number, {2}, kInt32, {std::int64_t{1} << 61})),
            "cu_seqlens_q of shape (2,) and strides (2305843009213693952,) reaches past what can be addressed.");
}

TEST(PackedErrors, ValuesOfOffsets) {
  const RangeRequest one{.batch = 1, .rows = 5, .keys = 6};
  EXPECT_EQ(error(extra(packed({0, 3, 2, 5}, {0, 6})), one),
            "cu_seqlens_q must start at 0 and ascend, got [0, 3, 2, 5].");
  EXPECT_EQ(error(extra(packed({0, 5}, {1, 6})), one), "cu_seqlens_k must start at 0 and ascend, got [1, 6].");
  EXPECT_EQ(error(extra(packed({-1, 5}, {0, 6})), one), "cu_seqlens_q must start at 0 and ascend, got [-1, 5].");
  EXPECT_EQ(error(extra(packed({0, 4}, {0, 6})), one),
            "cu_seqlens_q ends at 4, expected 5 (the tokens of a batch entry).");
  EXPECT_EQ(error(extra(packed({0, 15}, {0, 17})), {.batch = 3, .rows = 5, .keys = 6}),
            "cu_seqlens_k ends at 17, expected 6 (the tokens of a batch entry) or 18 (of the whole batch).");
}

TEST(PackedErrors, OffsetsThatDoNotFitEachOther) {
  const RangeRequest request{.batch = 2, .rows = 5, .keys = 6};
  EXPECT_EQ(error(extra(packed({0, 2, 5}, {0, 6})), request), "cu_seqlens_q describes 2 sequences, cu_seqlens_k 1.");
  EXPECT_EQ(error(extra(packed({0, 5}, {0, 12})), request),
            "cu_seqlens_q ends at 5 and cu_seqlens_k at 12: one counts a batch entry, the other the batch.");
  EXPECT_EQ(error(extra(packed({0, 10}, {0, 6})), request),
            "cu_seqlens_q ends at 10 and cu_seqlens_k at 6: one counts a batch entry, the other the batch.");
}

TEST(PackedErrors, SequencesThatCrossBatchEntries) {
  const RangeRequest request{.batch = 2, .rows = 5, .keys = 6};
  const std::string what = " crosses batch entries of 5 queries and 6 keys.";
  EXPECT_EQ(error(extra(packed({0, 3, 10}, {0, 6, 12})), request),
            "Packed sequence 1 (queries [3, 10), keys [6, 12))" + what);
  EXPECT_EQ(error(extra(packed({0, 5, 10}, {0, 7, 12})), request),
            "Packed sequence 0 (queries [0, 5), keys [0, 7))" + what);
  EXPECT_EQ(error(extra(packed({0, 5, 10}, {0, 5, 12})), request),
            "Packed sequence 1 (queries [5, 10), keys [5, 12))" + what);
}

// --- Packed sequences one by one

void expect_sequences(const MetadataExtra& given, const RangeRequest& request, const Bounds& numbers,
                      std::int64_t longest_rows, std::int64_t longest_keys, std::int64_t total_rows) {
  const auto ranges = extra(given)->key_ranges(request);
  ASSERT_TRUE(ranges->sequences);
  EXPECT_EQ(ranges->sequences->numbers, numbers);
  EXPECT_EQ(ranges->sequences->count(), static_cast<std::int64_t>(numbers.size()) / 4);
  EXPECT_EQ(ranges->sequences->longest_rows, longest_rows);
  EXPECT_EQ(ranges->sequences->longest_keys, longest_keys);
  EXPECT_EQ(ranges->sequences->total_rows, total_rows);
}

TEST(PackedSequences, HaveRowsAndKeys) {
  const RangeRequest request{.batch = 1, .rows = 9, .keys = 8};
  expect_sequences(packed({0, 2, 2, 5, 9}, {0, 3, 4, 4, 8}), request, {0, 2, 0, 3, 5, 4, 4, 4}, 4, 4, 6);
  expect_sequences(packed({0, 9}, {0, 0}), {.batch = 1, .rows = 9, .keys = 0}, {}, 0, 0, 0);
}

TEST(PackedSequences, CausalOnesBeginWhereRowsSeeKeys) {
  const MetadataExtra given = packed({0, 3, 5}, {0, 2, 6});
  const RangeRequest request{.batch = 1, .rows = 5, .keys = 6, .causal = true, .alignment = kBottomRight};
  expect_sequences(given, request, {1, 2, 0, 2, 3, 2, 2, 4}, 2, 4, 4);
  RangeRequest top_left = request;
  top_left.alignment = kTopLeft;
  expect_sequences(given, top_left, {0, 3, 0, 2, 3, 2, 2, 4}, 3, 4, 5);
}

TEST(PackedSequences, CountOnThroughTheBatch) {
  const RangeRequest request{.batch = 2, .rows = 5, .keys = 6};
  const Bounds numbers{0, 2, 0, 4, 2, 3, 4, 2, 5, 2, 6, 4, 7, 3, 10, 2};
  expect_sequences(packed({0, 2, 5}, {0, 4, 6}), request, numbers, 3, 4, 10);
  expect_sequences(packed({0, 2, 5, 7, 10}, {0, 4, 6, 10, 12}), request, numbers, 3, 4, 10);
}

TEST(PackedSequences, SpansHaveNone) {
  EXPECT_FALSE(spans({{}})->key_ranges({.batch = 1, .rows = 2, .keys = 2})->sequences);
}

TEST(PackedErrors, LongestSequence) {
  const RangeRequest request{.batch = 1, .rows = 5, .keys = 6};
  EXPECT_NO_THROW(extra(packed({0, 2, 5}, {0, 4, 6}, 3, 4))->key_ranges(request)) << "just enough";
  EXPECT_EQ(error(extra(packed({0, 2, 5}, {0, 4, 6}, 2, 4)), request),
            "max_seqlen_q is 2, but the longest sequence has 3 tokens.");
  EXPECT_EQ(error(extra(packed({0, 2, 5}, {0, 4, 6}, 3, 3)), request),
            "max_seqlen_k is 3, but the longest sequence has 4 tokens.");
  EXPECT_EQ(error(extra(with(packed({0, 5}, {0, 6}), "max_seqlen_q", "many")), request),
            "max_seqlen_q is not an integer, but the longest sequence has 5 tokens.");
}

// --- Valid prefix

TEST(ValidKvLength, WithinTheKeys) {
  EXPECT_EQ(extra({})->valid_kv_length(7), 7);
  EXPECT_EQ(extra(with({}, "valid_kv_length", nullptr))->valid_kv_length(7), 7);
  for (std::int64_t length : {0, 3, 7}) {
    EXPECT_EQ(extra(with({}, "valid_kv_length", length))->valid_kv_length(7), length);
  }
}

TEST(ValidKvLength, Errors) {
  const auto text = [](const tvm::ffi::Any& value) {
    return testing::error_text<ValueError>(
        [&] { return extra(with({}, "valid_kv_length", value))->valid_kv_length(7); });
  };
  const std::string what = "valid_kv_length must be within the K/V sequence, got ";
  EXPECT_EQ(text(-1), what + "-1 for length 7");
  EXPECT_EQ(text(8), what + "8 for length 7");
  EXPECT_EQ(text(3.0), what + "no integer for length 7");
  EXPECT_EQ(text("3"), what + "no integer for length 7");
}

// --- Kept answers

TEST(KeyRangesCache, TheLastAnswerIsKept) {
  const AttentionMetadata metadata = spans({{}});
  const RangeRequest request{.batch = 1, .rows = 2, .keys = 2};
  const auto first = metadata->key_ranges(request);
  EXPECT_EQ(metadata->key_ranges(request), first) << "worked out twice";
  EXPECT_EQ(AttentionMetadata(metadata)->key_ranges(request), first) << "another reference, the same metadata";
  for (const RangeRequest& other :
       {RangeRequest{.batch = 2, .rows = 2, .keys = 2}, RangeRequest{.batch = 1, .rows = 1, .keys = 2},
        RangeRequest{.batch = 1, .rows = 2, .keys = 1}, RangeRequest{.batch = 1, .rows = 2, .keys = 2, .causal = true},
        RangeRequest{.batch = 1, .rows = 2, .keys = 2, .alignment = kTopLeft}}) {
    EXPECT_NE(metadata->key_ranges(other), first);
  }
  EXPECT_EQ(first->bounds, (Bounds{0, 1, 0, 2})) << "an answer lives as long as its holders";
}

TEST(KeyRangesCache, AnErrorLeavesTheAnswer) {
  const AttentionMetadata metadata = spans({{{0, 2}}});
  const RangeRequest request{.batch = 1, .rows = 2, .keys = 2};
  const auto first = metadata->key_ranges(request);
  error(metadata, {.batch = 1, .rows = 2, .keys = 1});
  EXPECT_EQ(metadata->key_ranges(request), first);
}

TEST(KeyRangesCache, SixteenThreadsGetOneAnswer) {
  constexpr int kThreads = 16;
  const AttentionMetadata metadata = extra(packed({0, 2, 5}, {0, 3, 5}));
  std::array<std::shared_ptr<const KeyRanges>, kThreads> results;
  std::barrier start(kThreads);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      start.arrive_and_wait();
      result = metadata->key_ranges({.batch = 1, .rows = 5, .keys = 5});
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
  EXPECT_EQ(results[0]->bounds, (Bounds{0, 3, 0, 3, 3, 5, 3, 5, 3, 5}));
}

TEST(KeyRangesCache, SixteenThreadsWithOtherRequestsGetTheirOwn) {
  constexpr std::int64_t kThreads = 16;
  const AttentionMetadata metadata = spans({{}});
  std::array<int, kThreads> wrong = {};
  std::barrier start(kThreads);
  std::vector<std::thread> threads;
  for (std::int64_t rows = 1; rows <= kThreads; ++rows) {
    threads.emplace_back([&, rows] {
      start.arrive_and_wait();
      for (int round = 0; round < 200; ++round) {
        const auto ranges = metadata->key_ranges({.batch = 1, .rows = rows, .keys = 100});
        const bool right = ranges->bounds.size() == static_cast<std::size_t>(2 * rows) && ranges->bounds.back() == rows;
        wrong[static_cast<std::size_t>(rows - 1)] += right ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, (std::array<int, kThreads>{}));
}

}  // namespace
}  // namespace ditattn
