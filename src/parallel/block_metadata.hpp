#pragma once

/// The part of a call's metadata that speaks of some heads, rows and keys.

#include "ditattn/metadata.hpp"
#include "parallel/heads.hpp"
#include "parallel/visible.hpp"

namespace ditattn::parallel {

/// Sizes of the whole problem, of which every rank has a part.
struct Sizes {
  std::int64_t batch = 0;
  std::int64_t rows = 0;  ///< the image's
  std::int64_t keys = 0;  ///< the image's
  std::int64_t valid_keys = 0;
  std::int64_t joint_rows = 0;
  std::int64_t joint_keys = 0;
  bool joint_first = true;
  friend bool operator==(const Sizes&, const Sizes&) = default;

  [[nodiscard]] std::int64_t total_rows() const { return rows + joint_rows; }
  [[nodiscard]] std::int64_t total_keys() const { return valid_keys + joint_keys; }
};

/// Tokens of the image's or of the text's: [tokens.begin, tokens.end) of theirs.
struct Segment {
  bool joint = false;
  Range tokens;
};

/// Where a segment stands in joined order.
Range joined_rows(const Sizes& sizes, const Segment& segment);
Range joined_keys(const Sizes& sizes, const Segment& segment);

/// The image's rows, and the text's, among the `rows` of a rank's output.
Range image_rows(const Sizes& sizes, std::int64_t rows);
Range text_rows(const Sizes& sizes, std::int64_t rows);

/// All of the metadata for some query heads: masks and joint tensors cut to them. Null stays null.
AttentionMetadata head_metadata(const AttentionMetadata& metadata, const Sizes& sizes, const HeadRun& heads);

/// What is left for one call: its part of the mask, and options. Which rows see which keys is in the call already.
AttentionMetadata call_metadata(const AttentionMetadata& metadata, const Sizes& sizes, const HeadRun& heads,
                                const Segment& rows, const Segment& keys, const BlockCall& call);

}  // namespace ditattn::parallel
