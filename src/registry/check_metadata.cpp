#include "registry/check_metadata.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "ditattn/errors.hpp"
#include "registry/check_tensor.hpp"

namespace ditattn {
namespace {

// What a mask may broadcast to: (batch, heads, rows, keys) for one of two numbers of rows and of keys.
struct MaskSizes {
  std::int64_t batch;
  std::int64_t heads;
  std::array<std::int64_t, 2> rows;  // the image's, the joined
  std::array<std::int64_t, 2> keys;
};

bool fits(const Tensor& mask, const MaskSizes& sizes) {
  const auto broadcasts = [&](int from_end, std::int64_t to) {
    return from_end > mask.ndim() || mask.size(-from_end) == to || mask.size(-from_end) == 1;
  };
  const bool has_keys = std::ranges::count(sizes.keys, mask.size(-1)) > 0;
  if (mask.ndim() == 2) return broadcasts(2, sizes.batch) && has_keys;
  return (has_keys || mask.size(-1) == 1) && (broadcasts(2, sizes.rows[0]) || broadcasts(2, sizes.rows[1])) &&
         broadcasts(3, sizes.heads) && broadcasts(4, sizes.batch);
}

// A mask is bool or a float, on the query's device, and broadcasts; two dimensions are (batch, keys).
void check_mask(const char* what, const Tensor& mask, DLDevice device, const MaskSizes& sizes) {
  const DLDataType dtype = mask.dtype();
  if (dtype != kBool && dtype != kFloat32 && dtype != kFloat16 && dtype != kBFloat16) {
    throw ValueError(
        fmt::format("{} has dtype {}. Valid dtypes are: bool (true = attend), and float32, float16, "
                    "bfloat16 (added to the logits).",
                    what, dtype_name(dtype)));
  }
  if (!same_device(mask.device(), device)) {
    throw ValueError(fmt::format("{} is on {}, query on {}.", what, device_name(mask.device()), device_name(device)));
  }
  if (mask.ndim() < 1 || mask.ndim() > 4) {
    throw ValueError(fmt::format("{} must have 1 to 4 dimensions, got shape {}.", what, shape_name(mask)));
  }
  check_extent(what, mask);
  if (fits(mask, sizes)) return;
  const char* hint = mask.ndim() == 2
                         ? " Two dimensions are (batch, keys); give a (queries, keys) mask as (1, 1, queries, keys)."
                         : "";
  const std::array full = {sizes.batch, sizes.heads, sizes.rows[0], sizes.keys[0]};
  const std::array joined = {sizes.batch, sizes.heads, sizes.rows[1], sizes.keys[1]};
  throw ValueError(fmt::format("{} of shape {} does not broadcast to (batch, heads, queries, keys) = {}{}.{}", what,
                               shape_name(mask), shape_name(full),
                               full == joined ? "" : fmt::format(", nor to the joined {}", shape_name(joined)), hint));
}

// `of_some_rows`: the text's rows are not the mask's, so that it hides keys from some rows and not from others.
MaskKind kind_of(const Tensor& mask, const MaskDescription& description, bool of_some_rows) {
  if (description.kind == MaskDescription::Kind::none) return MaskKind::none;
  if (description.kind == MaskDescription::Kind::key_prefix && !of_some_rows) return MaskKind::padding;
  if (mask.dtype() != kBool) return MaskKind::additive;
  if (of_some_rows) return MaskKind::boolean;
  const auto constant = [&](int from_end) {
    return mask.ndim() < from_end || mask.size(-from_end) == 1 || mask.stride(-from_end) == 0;
  };
  return mask.ndim() == 2 || (constant(2) && constant(3)) ? MaskKind::padding : MaskKind::boolean;
}

// The more demanding of the two masks.
MaskKind mask_kind(const AttentionMetadataObj& metadata, std::int64_t image_rows, std::int64_t total_rows) {
  MaskKind kind = MaskKind::none;
  if (metadata.fields.attn_mask.has_value()) {
    const Tensor& mask = metadata.fields.attn_mask.value();
    const bool of_image_rows =
        mask.ndim() > 2 && mask.size(-2) == image_rows && image_rows != 1 && image_rows != total_rows;
    kind = kind_of(mask, metadata.mask_description(), of_image_rows);
  }
  if (metadata.fields.joint_attn_mask.has_value()) {
    kind = std::max(kind, kind_of(metadata.fields.joint_attn_mask.value(), metadata.joint_mask_description(), false));
  }
  return kind;
}

// Joint tensors come all three or not at all, and fit the image's.
void check_joint(const AttentionMetadataFields& fields, const Tensor& query, const Tensor& key) {
  const bool some = fields.joint_query.has_value() || fields.joint_key.has_value() || fields.joint_value.has_value();
  const bool all = fields.joint_query.has_value() && fields.joint_key.has_value() && fields.joint_value.has_value();
  if (some != all) {
    throw ValueError("joint_query, joint_key, and joint_value should be None or not None simultaneously.");
  }
  if (fields.joint_attn_mask.has_value() && !all) {
    throw ValueError("joint_attn_mask needs joint_query, joint_key and joint_value.");
  }
  if (fields.joint_strategy != "front" && fields.joint_strategy != "rear") {
    throw ValueError(fmt::format("joint_strategy: {} not supported. supported joint strategy: ['front', 'rear']",
                                 fields.joint_strategy));
  }
  if (!all) return;
  const auto check = [&](const char* what, const Tensor& tensor, const Tensor& like) {
    check_input(what, tensor);
    if (tensor.dtype() != like.dtype() || !same_device(tensor.device(), like.device())) {
      throw ValueError(fmt::format("{} is {} on {}, expected {} on {} like the image's.", what,
                                   dtype_name(tensor.dtype()), device_name(tensor.device()), dtype_name(like.dtype()),
                                   device_name(like.device())));
    }
    check_size(what, tensor, 0, "batch", like.size(0));
    check_size(what, tensor, 2, "heads", like.size(2));
    check_size(what, tensor, 3, "head_size", like.size(3));
  };
  check("joint_query", fields.joint_query.value(), query);
  check("joint_key", fields.joint_key.value(), key);
  check("joint_value", fields.joint_value.value(), key);
  check_size("joint_value", fields.joint_value.value(), 1, "tokens", fields.joint_key.value().size(1));
}

void check_masks(const AttentionMetadataFields& fields, const Tensor& query, const Tensor& key,
                 std::int64_t total_rows) {
  const std::int64_t joint_keys = fields.joint_key.has_value() ? fields.joint_key.value().size(1) : 0;
  if (fields.attn_mask.has_value()) {
    check_mask("attn_mask", fields.attn_mask.value(), query.device(),
               {.batch = query.size(0),
                .heads = query.size(2),
                .rows = {query.size(1), total_rows},
                .keys = {key.size(1), key.size(1) + joint_keys}});
  }
  if (!fields.joint_attn_mask.has_value()) return;
  if (joint_keys > 0 && fields.attn_mask.has_value() && fields.attn_mask.value().size(-1) == key.size(1) + joint_keys) {
    throw ValueError(
        fmt::format("attn_mask of shape {} spans the joined keys already: joint_attn_mask must be left out.",
                    shape_name(fields.attn_mask.value())));
  }
  check_mask("joint_attn_mask", fields.joint_attn_mask.value(), query.device(),
             {.batch = query.size(0),
              .heads = query.size(2),
              .rows = {total_rows, total_rows},
              .keys = {joint_keys, joint_keys}});
}

}  // namespace

void check_metadata(const AttentionMetadataObj& metadata, const Tensor& query, const Tensor& key,
                    CausalAlignment alignment, Problem& problem) {
  const AttentionMetadataFields& fields = metadata.fields;
  check_joint(fields, query, key);
  problem.joint = metadata.has_joint();
  for (const auto* tensor : {&fields.joint_query, &fields.joint_key, &fields.joint_value}) {
    if (tensor->has_value()) problem.alignment = std::min(problem.alignment, alignment_of(tensor->value()));
  }
  problem.seq_kv = metadata.valid_kv_length(key.size(1));
  if (problem.joint) {
    problem.seq_q += fields.joint_query.value().size(1);
    problem.seq_kv += fields.joint_key.value().size(1);
  }
  check_masks(fields, query, key, problem.seq_q);
  problem.mask = mask_kind(metadata, query.size(1), problem.seq_q);
  problem.spans = fields.full_attn_spans.has_value();
  problem.packed = metadata.is_packed() && !problem.spans;
  problem.fp8_kv = metadata.wants_fp8_kv();
  if (problem.packed && problem.joint) {
    throw ValueError(
        "Packed sequences (cu_seqlens) and joint text tokens cannot be combined: put the text into the packed "
        "tensors.");
  }
  if (!problem.spans && !fields.query_ranges.empty()) {
    throw ValueError("query_ranges place rows for full_attn_spans, which are missing.");
  }
  // Worked out now, so that what is malformed is refused before anything is written; kept for the kernel.
  metadata.key_ranges({.batch = problem.batch,
                       .rows = problem.seq_q,
                       .keys = problem.seq_kv,
                       .causal = problem.causal,
                       .alignment = alignment});
}

}  // namespace ditattn
