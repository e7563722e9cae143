#include "backends/reference/rules.hpp"

#include <limits>

namespace ditattn::reference {
namespace {

using tvm::ffi::String;

std::vector<std::int64_t> offsets(const MetadataExtra& extra, const char* name) {
  const auto entry = extra.Get(String(name));
  if (!entry) return {};
  const auto tensor = entry->cast<Tensor>();
  std::vector<std::int64_t> result;
  result.reserve(static_cast<std::size_t>(tensor.size(0)));
  for (std::int64_t i = 0; i < tensor.size(0); ++i) {
    result.push_back(static_cast<std::int64_t>(load_element(data_pointer(tensor), i * tensor.stride(0), kInt32)));
  }
  return result;
}

}  // namespace

Rules::Rules(const Tensor& query, const Tensor& key, const AttentionMetadata& metadata, bool causal,
             CausalAlignment alignment)
    : batch_(query.size(0)),
      heads_(query.size(2)),
      image_rows_(query.size(1)),
      image_keys_(key.size(1)),
      mask_keys_(key.size(1)),
      causal_(causal),
      alignment_(alignment) {
  if (!metadata.defined()) return;
  fields_ = &metadata->fields;
  if (const auto valid = fields_->extra.Get(String("valid_kv_length"))) image_keys_ = valid->cast<std::int64_t>();
  if (fields_->joint_key.has_value()) {
    joint_rows_ = fields_->joint_query.value().size(1);
    joint_keys_ = fields_->joint_key.value().size(1);
    joint_first_ = fields_->joint_strategy == "front";
  }
  cu_q_ = offsets(fields_->extra, "cu_seqlens_q");
  cu_k_ = offsets(fields_->extra, "cu_seqlens_k");
}

Place Rules::place(std::int64_t position, std::int64_t image, std::int64_t joint) const {
  if (joint_first_) return position < joint ? Place{true, position} : Place{false, position - joint};
  return position < image ? Place{false, position} : Place{true, position - image};
}

bool Rules::sees(std::int64_t batch, std::int64_t row, std::int64_t key) const {
  if (fields_ != nullptr && fields_->full_attn_spans) {
    return sees_in_spans(*fields_->full_attn_spans, batch, row, key);
  }
  if (!cu_q_.empty()) return sees_in_pack(batch, row, key);
  if (!causal_) return true;
  return key <= row + (alignment_ == CausalAlignment::bottom_right ? keys() - rows() : 0);
}

bool Rules::sees_in_spans(const std::vector<std::vector<Span>>& samples, std::int64_t batch, std::int64_t row,
                          std::int64_t key) const {
  std::int64_t position = row;
  for (const QueryRange& range : fields_->query_ranges) {
    if (row >= range.local_start && row < range.local_end) position = range.global_start + row - range.local_start;
  }
  for (const Span& span : samples[samples.size() == 1 ? 0 : static_cast<std::size_t>(batch)]) {
    if (position >= span.begin && position < span.end) return key < span.end;
  }
  return key <= position;
}

bool Rules::sees_in_pack(std::int64_t batch, std::int64_t row, std::int64_t key) const {
  // Offsets count either the tokens of each batch entry or those of the whole batch.
  const bool whole = cu_q_.back() != rows() || cu_k_.back() != keys();
  const std::int64_t q = row + (whole ? batch * rows() : 0);
  const std::int64_t k = key + (whole ? batch * keys() : 0);
  for (std::size_t i = 0; i + 1 < cu_q_.size(); ++i) {
    if (q < cu_q_[i] || q >= cu_q_[i + 1]) continue;
    if (k < cu_k_[i] || k >= cu_k_[i + 1]) return false;
    const std::int64_t queries = cu_q_[i + 1] - cu_q_[i];
    const std::int64_t length = cu_k_[i + 1] - cu_k_[i];
    const std::int64_t offset = alignment_ == CausalAlignment::bottom_right ? length - queries : 0;
    return !causal_ || k - cu_k_[i] <= q - cu_q_[i] + offset;
  }
  return false;
}

double Rules::added(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t key) const {
  if (fields_ == nullptr) return 0;
  const Place column = key_place(key);
  double sum = 0;
  if (fields_->attn_mask.has_value()) {
    const Tensor& mask = fields_->attn_mask.value();
    const std::int64_t columns = mask.size(-1);
    const bool joined_columns = joint_keys_ > 0 && columns == mask_keys_ + joint_keys_;
    const bool image_rows_only = mask.ndim() > 2 && mask.size(-2) == image_rows_ && image_rows_ != 1 && joint_rows_ > 0;
    const Place place = row_place(row);
    const bool reaches = (joined_columns || !column.joint) && !(image_rows_only && place.joint);
    std::int64_t at = column.index;
    if (joined_columns && joint_first_ && !column.joint) at += joint_keys_;
    if (joined_columns && !joint_first_ && column.joint) at += mask_keys_;
    if (reaches) sum += element(mask, batch, head, image_rows_only ? place.index : row, at);
  }
  if (column.joint && fields_->joint_attn_mask.has_value()) {
    sum += element(fields_->joint_attn_mask.value(), batch, head, row, column.index);
  }
  return sum;
}

// Two dimensions are (batch, keys); others line up from the last, sizes of 1 broadcast.
double Rules::element(const Tensor& mask, std::int64_t batch, std::int64_t head, std::int64_t row,
                      std::int64_t column) const {
  const std::int64_t position[4] = {batch, head, row, column};
  std::int64_t index = 0;
  for (int i = 0; i < mask.ndim(); ++i) {
    const int dimension = mask.ndim() == 2 ? (i == 0 ? 0 : 3) : 4 - mask.ndim() + i;
    if (mask.size(i) > 1) index += position[dimension] * mask.stride(i);
  }
  const double value = load_element(data_pointer(mask), index, mask.dtype());
  if (mask.dtype() != kBool) return value;
  return value != 0 ? 0 : -std::numeric_limits<double>::infinity();
}

}  // namespace ditattn::reference
