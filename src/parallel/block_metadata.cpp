#include "parallel/block_metadata.hpp"

#include <array>
#include <optional>
#include <string_view>

namespace ditattn::parallel {
namespace {

// Options that say which keys are seen, and not how to compute.
constexpr std::array<std::string_view, 5> kKeyOptions = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
                                                         "valid_kv_length"};

MetadataExtra without_key_options(const MetadataExtra& extra) {
  MetadataExtra rest;
  for (const auto& [name, value] : extra) {
    if (std::ranges::count(kKeyOptions, std::string_view(name.data(), name.size())) == 0) rest.Set(name, value);
  }
  return rest;
}

// Cuts the dimension that is `from_end` th from the last, unless the mask lacks it or is broadcast along it.
Tensor cut(const Tensor& mask, int from_end, Range range) {
  if (from_end > mask.ndim() || mask.size(-from_end) == 1) return mask;
  return slice(mask, mask.ndim() - from_end, range);
}

// Two dimensions are (batch, keys).
Tensor cut_heads(const Tensor& mask, Range heads) { return mask.ndim() < 3 ? mask : cut(mask, 3, heads); }
Tensor cut_batch(const Tensor& mask, Range batch) { return cut(mask, mask.ndim() == 2 ? 2 : 4, batch); }
Tensor cut_rows(const Tensor& mask, Range rows) { return mask.ndim() < 3 ? mask : cut(mask, 2, rows); }
Tensor cut_keys(const Tensor& mask, Range keys) { return mask.ndim() == 2 ? slice(mask, 1, keys) : cut(mask, 1, keys); }

Range moved(Range range, std::int64_t by) { return {range.begin + by, range.end + by}; }

// Whether a mask has the image's rows only, and so leaves the text's alone.
bool has_image_rows_only(const Tensor& mask, const Sizes& sizes) {
  return mask.ndim() > 2 && mask.size(-2) == sizes.rows && sizes.joint_rows > 0 && sizes.rows != 1;
}

struct MaskColumns {
  Tensor mask;
  std::int64_t first = 0;  // column of the segment's own token 0
};

// The mask that speaks of a segment's keys, and where. Nothing: none does.
std::optional<MaskColumns> columns_for(const AttentionMetadataFields& fields, const Sizes& sizes, bool joint) {
  const bool joined = fields.attn_mask.has_value() && sizes.joint_keys > 0 &&
                      fields.attn_mask.value().size(-1) == sizes.keys + sizes.joint_keys;
  if (joint && !joined) {
    if (!fields.joint_attn_mask.has_value()) return std::nullopt;
    return MaskColumns{fields.joint_attn_mask.value(), 0};
  }
  if (!fields.attn_mask.has_value()) return std::nullopt;
  const std::int64_t before = joint ? sizes.keys : sizes.joint_keys;
  return MaskColumns{fields.attn_mask.value(), joined && joint != sizes.joint_first ? before : 0};
}

}  // namespace

Range joined_rows(const Sizes& sizes, const Segment& segment) {
  const std::int64_t before = segment.joint ? sizes.rows : sizes.joint_rows;
  return moved(segment.tokens, segment.joint == sizes.joint_first ? 0 : before);
}

Range image_rows(const Sizes& sizes, std::int64_t rows) {
  return sizes.joint_first ? Range{sizes.joint_rows, rows} : Range{0, rows - sizes.joint_rows};
}

Range text_rows(const Sizes& sizes, std::int64_t rows) {
  return sizes.joint_first ? Range{0, sizes.joint_rows} : Range{rows - sizes.joint_rows, rows};
}

Range joined_keys(const Sizes& sizes, const Segment& segment) {
  const std::int64_t before = segment.joint ? sizes.valid_keys : sizes.joint_keys;
  return moved(segment.tokens, segment.joint == sizes.joint_first ? 0 : before);
}

AttentionMetadata head_metadata(const AttentionMetadata& metadata, const Sizes& sizes, const HeadRun& heads) {
  if (!metadata.defined()) return metadata;
  AttentionMetadataFields fields = metadata->fields;
  for (auto* mask : {&fields.attn_mask, &fields.joint_attn_mask}) {
    if (mask->has_value()) *mask = cut_heads(mask->value(), heads.query);
  }
  if (sizes.joint_rows + sizes.joint_keys > 0 || metadata->has_joint()) {
    fields.joint_query = slice(fields.joint_query.value(), 2, heads.query);
    fields.joint_key = slice(fields.joint_key.value(), 2, heads.kv);
    fields.joint_value = slice(fields.joint_value.value(), 2, heads.kv);
  }
  return AttentionMetadata(std::move(fields));
}

AttentionMetadata call_metadata(const AttentionMetadata& metadata, const Sizes& sizes, const HeadRun& heads,
                                const Segment& rows, const Segment& keys, const BlockCall& call) {
  if (!metadata.defined()) return metadata;
  AttentionMetadataFields fields;
  fields.extra = without_key_options(metadata->fields.extra);
  const auto columns = columns_for(metadata->fields, sizes, keys.joint);
  const bool image_only = columns && has_image_rows_only(columns->mask, sizes);
  if (columns && !(image_only && rows.joint)) {
    const std::int64_t first_row = image_only ? rows.tokens.begin : joined_rows(sizes, rows).begin;
    Tensor mask = cut_heads(cut_batch(columns->mask, call.batch), heads.query);
    mask = cut_rows(mask, moved(call.rows, first_row));
    fields.attn_mask = cut_keys(mask, moved(call.keys, keys.tokens.begin + columns->first));
  }
  return AttentionMetadata(std::move(fields));
}

}  // namespace ditattn::parallel
