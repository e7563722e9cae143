// From tensors and metadata to segments in joined order: what kernels read, in place.

#include "ditattn/backend.hpp"

namespace ditattn {
namespace {

// Columns of a mask that belong to one key segment, and the rows it speaks of.
struct MaskWindow {
  const Tensor* mask = nullptr;
  const MaskDescription* description = nullptr;
  std::int64_t first_column = 0;
  std::int64_t first_row = 0;  // where the mask's rows stand, if they are not all
  std::int64_t row_count = 0;  // rows it speaks of, all if it is the same for every row
};

std::int64_t stride_or_zero(const Tensor& mask, int from_end) {
  return from_end <= mask.ndim() && mask.size(-from_end) > 1 ? mask.stride(-from_end) : 0;
}

MaskView view_of(const MaskWindow& window) {
  const Tensor& mask = *window.mask;
  MaskView view{.data = nullptr,
                .dtype = mask.dtype(),
                .strides = mask.ndim() == 2
                               ? std::array{stride_or_zero(mask, 2), std::int64_t{0}, std::int64_t{0}, mask.stride(-1)}
                               : std::array{stride_or_zero(mask, 4), stride_or_zero(mask, 3), stride_or_zero(mask, 2),
                                            stride_or_zero(mask, 1)},
                .first_row = window.first_row,
                .rows = window.row_count};
  const std::int64_t bytes = mask.dtype().bits / 8;
  view.data = static_cast<const char*>(data_pointer(mask)) + window.first_column * view.strides[3] * bytes;
  return view;
}

// A prefix becomes lengths, anything else is read element by element.
void apply_mask(KeySegment& segment, const MaskWindow& window, std::int64_t total_rows) {
  if (window.mask == nullptr || window.description->kind == MaskDescription::Kind::none) return;
  const bool all_rows = window.row_count == total_rows;
  if (window.description->kind == MaskDescription::Kind::key_prefix && all_rows) {
    segment.prefix = window.description;
    segment.length_offset = window.first_column;
  } else {
    segment.mask = view_of(window);
  }
}

// Rows of a mask: all, or, where it has the image's rows only, those.
MaskWindow window_of(const Tensor& mask, const MaskDescription& description, std::int64_t first_column,
                     std::int64_t image_rows, std::int64_t first_image_row, std::int64_t total_rows) {
  const bool image_only = mask.ndim() > 2 && mask.size(-2) == image_rows && image_rows != total_rows && image_rows != 1;
  return {.mask = &mask,
          .description = &description,
          .first_column = first_column,
          .first_row = image_only ? first_image_row : 0,
          .row_count = image_only ? image_rows : total_rows};
}

}  // namespace

CallPlan AttentionCall::plan(bool causal, CausalAlignment alignment) const {
  CallPlan plan;
  const AttentionMetadataObj* md = metadata.defined() ? metadata.operator->() : nullptr;
  const bool joint = md != nullptr && md->has_joint();
  const std::int64_t image_keys = md == nullptr ? key.size(1) : md->valid_kv_length(key.size(1));
  plan.queries[0].tensor = query;
  plan.keys[0] = {.key = key, .value = value, .keys = image_keys, .mask = {}};
  plan.num_queries = plan.num_keys = 1;
  int image = 0;
  if (joint) {
    image = md->joint_first() ? 1 : 0;
    plan.num_queries = plan.num_keys = 2;
    plan.queries[1 - image].tensor = md->fields.joint_query.value();
    plan.queries[image].tensor = query;
    plan.keys[image] = {.key = key, .value = value, .keys = image_keys, .mask = {}};
    plan.keys[1 - image] = {.key = md->fields.joint_key.value(),
                            .value = md->fields.joint_value.value(),
                            .keys = md->fields.joint_key.value().size(1),
                            .mask = {}};
    plan.queries[1].first_row = plan.queries[0].tensor.size(1);
    plan.keys[1].first_key = plan.keys[0].keys;
  }
  for (int i = 0; i < plan.num_queries; ++i) plan.total_rows += plan.queries[i].tensor.size(1);
  for (int i = 0; i < plan.num_keys; ++i) plan.total_keys += plan.keys[i].keys;
  plan.causal = causal;
  plan.causal_offset = alignment == CausalAlignment::bottom_right ? plan.total_keys - plan.total_rows : 0;
  if (md == nullptr) return plan;

  const std::int64_t first_image_row = plan.queries[image].first_row;
  if (md->fields.attn_mask.has_value()) {
    const Tensor& mask = md->fields.attn_mask.value();
    const MaskDescription& description = md->mask_description();
    const std::int64_t joint_keys = joint ? plan.keys[1 - image].keys : 0;
    const bool joined = joint && mask.size(-1) == key.size(1) + joint_keys;
    const auto window = [&](std::int64_t first_column) {
      return window_of(mask, description, first_column, query.size(1), first_image_row, plan.total_rows);
    };
    apply_mask(plan.keys[image], window(joined && image == 1 ? joint_keys : 0), plan.total_rows);
    if (joined) apply_mask(plan.keys[1 - image], window(image == 1 ? 0 : key.size(1)), plan.total_rows);
  }
  if (joint && md->fields.joint_attn_mask.has_value()) {
    const Tensor& mask = md->fields.joint_attn_mask.value();
    apply_mask(plan.keys[1 - image],
               window_of(mask, md->joint_mask_description(), 0, query.size(1), first_image_row, plan.total_rows),
               plan.total_rows);
  }
  plan.ranges = md->key_ranges({.batch = query.size(0),
                                .rows = plan.total_rows,
                                .keys = plan.total_keys,
                                .causal = causal,
                                .alignment = alignment});
  if (plan.ranges) plan.causal = false;
  return plan;
}

}  // namespace ditattn
