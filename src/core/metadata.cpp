// Spans and packed sequences as the range of keys that each row sees.

#include "ditattn/metadata.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <utility>

#include "core/tensor_extent.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

using tvm::ffi::String;

constexpr const char* kPackedKeys[] = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"};

std::string span_name(const Span& span) { return fmt::format("[{}, {})", span.begin, span.end); }

// --- Spans
// ------------------------------------------------------------------------------------------------------------

void check_spans(const std::vector<Span>& spans, std::int64_t keys) {
  std::int64_t previous = 0;
  for (const Span& span : spans) {
    if (span.begin < 0 || span.begin >= span.end || span.end > keys) {
      throw ValueError(
          fmt::format("full_attn_spans has {}, which is not a non-empty span within [0, {}).", span_name(span), keys));
    }
    if (span.begin < previous) {
      throw ValueError(
          fmt::format("full_attn_spans has {} after a span that ends at {}: spans must be sorted and not overlap.",
                      span_name(span), previous));
    }
    previous = span.end;
  }
}

// The global position of each local row.
std::vector<std::int64_t> global_rows(const std::vector<QueryRange>& ranges, std::int64_t rows) {
  std::vector<std::int64_t> positions;
  positions.reserve(static_cast<std::size_t>(rows));
  for (const QueryRange& range : ranges) {
    if (std::cmp_not_equal(range.local_start, positions.size()) || range.local_end < range.local_start ||
        range.local_end > rows || range.global_start < 0 ||
        range.global_start > INT64_MAX - (range.local_end - range.local_start)) {
      throw ValueError(
          fmt::format("query_ranges must cover local query contiguously, got ({}, {}, {}) where row {} of {} was due.",
                      range.local_start, range.local_end, range.global_start, positions.size(), rows));
    }
    for (std::int64_t row = range.local_start; row < range.local_end; ++row) {
      positions.push_back(range.global_start + row - range.local_start);
    }
  }
  if (ranges.empty()) {
    for (std::int64_t row = 0; row < rows; ++row) positions.push_back(row);
  }
  if (std::cmp_not_equal(positions.size(), rows)) {
    throw ValueError(
        fmt::format("query_ranges must cover local query contiguously, got {} of {} rows.", positions.size(), rows));
  }
  return positions;
}

KeyRanges span_ranges(const std::vector<std::vector<Span>>& samples, const std::vector<QueryRange>& rows,
                      const RangeRequest& request) {
  const auto count = static_cast<std::int64_t>(samples.size());
  if (count != 1 && count != request.batch) {
    throw ValueError(
        fmt::format("full_attn_spans has {} samples, the batch {}. Give one list per sample, or one for all.", count,
                    request.batch));
  }
  const std::vector<std::int64_t> positions = global_rows(rows, request.rows);
  KeyRanges result{.bounds = {}, .batch_stride = count > 1 ? 2 * request.rows : 0};
  for (const std::vector<Span>& spans : samples) {
    check_spans(spans, request.keys);
    for (std::int64_t position : positions) {
      const auto next = std::ranges::upper_bound(spans, position, {}, &Span::begin);
      const bool inside = next != spans.begin() && position < std::prev(next)->end;
      const std::int64_t end = inside ? std::prev(next)->end : position + 1;
      result.bounds.insert(result.bounds.end(), {0, std::min(end, request.keys)});
    }
  }
  return result;
}

// --- Packed sequences
// -------------------------------------------------------------------------------------------------

// cu_seqlens on the host, checked: starts at 0, ascends, ends at one entry's tokens or at the whole batch's.
std::vector<std::int64_t> read_offsets(const MetadataExtra& extra, const char* name, std::int64_t batch,
                                       std::int64_t tokens) {
  const auto entry = extra.at(String(name)).as<Tensor>();
  const Tensor tensor = entry.value_or(Tensor());  // None is a null tensor
  const auto is_readable = [&] {
    return tensor.device().device_type == kDLCPU || tensor.device().device_type == kDLCUDA;
  };
  if (!tensor.defined() || tensor.ndim() != 1 || tensor.dtype() != kInt32 || tensor.numel() < 2 || !is_readable()) {
    const std::string got = tensor.defined() ? fmt::format("{} {} on {}", dtype_name(tensor.dtype()),
                                                           shape_name(tensor), device_name(tensor.device()))
                                             : "no tensor";
    throw ValueError(fmt::format(
        "{} must be a one-dimensional int32 tensor of at least 2 elements in host or CUDA memory, got {}.", name, got));
  }
  check_extent(name, tensor);
  const Tensor on_host = tensor.device().device_type == kDLCPU ? tensor : copy_to(tensor, kCpu);
  std::vector<std::int64_t> offsets;
  offsets.reserve(static_cast<std::size_t>(tensor.size(0)));
  for (std::int64_t i = 0; i < tensor.size(0); ++i) {
    offsets.push_back(static_cast<std::int64_t>(load_element(data_pointer(on_host), i * on_host.stride(0), kInt32)));
  }
  if (offsets.front() != 0 || !std::ranges::is_sorted(offsets)) {
    throw ValueError(fmt::format("{} must start at 0 and ascend, got [{}].", name, fmt::join(offsets, ", ")));
  }
  if (offsets.back() != tokens && offsets.back() != batch * tokens) {
    throw ValueError(fmt::format("{} ends at {}, expected {} (the tokens of a batch entry{}).", name, offsets.back(),
                                 tokens, batch > 1 ? fmt::format(") or {} (of the whole batch", batch * tokens) : ""));
  }
  return offsets;
}

void check_max_length(const MetadataExtra& extra, const char* name, const std::vector<std::int64_t>& offsets) {
  const auto limit = extra.at(String(name)).as<std::int64_t>();
  std::int64_t longest = 0;
  for (std::size_t i = 1; i < offsets.size(); ++i) longest = std::max(longest, offsets[i] - offsets[i - 1]);
  if (!limit || *limit < longest) {
    throw ValueError(fmt::format("{} is {}, but the longest sequence has {} tokens.", name,
                                 limit ? std::to_string(*limit) : "not an integer", longest));
  }
}

// One more sequence: first row, rows, first key, keys. Without rows or without keys it is none.
void add_sequence(PackedSequences& sequences, std::array<std::int64_t, 4> numbers) {
  auto& [first_row, rows, first_key, keys] = numbers;
  if (rows <= 0 || keys <= 0) return;
  sequences.numbers.insert(sequences.numbers.end(), numbers.begin(), numbers.end());
  sequences.longest_rows = std::max(sequences.longest_rows, rows);
  sequences.longest_keys = std::max(sequences.longest_keys, keys);
  sequences.total_rows += rows;
}

KeyRanges packed_ranges(const AttentionMetadataFields& fields, const RangeRequest& request) {
  const std::vector<std::int64_t> q = read_offsets(fields.extra, "cu_seqlens_q", request.batch, request.rows);
  const std::vector<std::int64_t> k = read_offsets(fields.extra, "cu_seqlens_k", request.batch, request.keys);
  if (q.size() != k.size()) {
    throw ValueError(fmt::format("cu_seqlens_q describes {} sequences, cu_seqlens_k {}.", q.size() - 1, k.size() - 1));
  }
  check_max_length(fields.extra, "max_seqlen_q", q);
  check_max_length(fields.extra, "max_seqlen_k", k);
  const bool whole_batch = q.back() != request.rows || k.back() != request.keys;
  if (whole_batch && (q.back() != request.batch * request.rows || k.back() != request.batch * request.keys)) {
    throw ValueError(
        fmt::format("cu_seqlens_q ends at {} and cu_seqlens_k at {}: one counts a batch entry, the other the batch.",
                    q.back(), k.back()));
  }
  KeyRanges result{.bounds = {}, .batch_stride = whole_batch ? 2 * request.rows : 0, .sequences = PackedSequences{}};
  result.bounds.reserve(2 * static_cast<std::size_t>(q.back()));
  for (std::size_t i = 0; i + 1 < q.size(); ++i) {
    if (q[i] == q[i + 1]) continue;
    const std::int64_t entry = q[i] / request.rows;
    const std::int64_t first_key = k[i] - entry * request.keys;
    const std::int64_t end_key = k[i + 1] - entry * request.keys;
    if ((q[i + 1] - 1) / request.rows != entry || first_key < 0 || end_key > request.keys) {
      throw ValueError(fmt::format(
          "Packed sequence {} (queries [{}, {}), keys [{}, {})) crosses batch entries of {} queries and {} keys.", i,
          q[i], q[i + 1], k[i], k[i + 1], request.rows, request.keys));
    }
    const std::int64_t offset =
        request.alignment == CausalAlignment::bottom_right ? (end_key - first_key) - (q[i + 1] - q[i]) : 0;
    for (std::int64_t row = q[i]; row < q[i + 1]; ++row) {
      const std::int64_t causal_end = first_key + row - q[i] + offset + 1;
      const std::int64_t end = request.causal ? std::clamp(causal_end, first_key, end_key) : end_key;
      result.bounds.insert(result.bounds.end(), {first_key, end});
    }
    const std::int64_t without_keys = request.causal ? std::max<std::int64_t>(-offset, 0) : 0;
    add_sequence(*result.sequences, {q[i] + without_keys, q[i + 1] - q[i] - without_keys, k[i], end_key - first_key});
  }
  if (!whole_batch) {
    const std::vector<std::int64_t> of_entry = result.sequences->numbers;
    for (std::int64_t b = 1; b < request.batch; ++b) {
      for (std::size_t i = 0; i < of_entry.size(); i += 4) {
        add_sequence(*result.sequences, {b * request.rows + of_entry[i], of_entry[i + 1],
                                         b * request.keys + of_entry[i + 2], of_entry[i + 3]});
      }
    }
  }
  return result;
}

}  // namespace

AttentionMetadata::AttentionMetadata(AttentionMetadataFields fields) {
  auto object = tvm::ffi::make_object<AttentionMetadataObj>();
  object->fields = std::move(fields);
  data_ = std::move(object);
}

bool AttentionMetadataObj::is_packed() const {
  std::vector<std::string> missing;
  for (const char* key : kPackedKeys) {
    if (fields.extra.count(String(key)) == 0) missing.push_back(fmt::format("'{}'", key));
  }
  if (missing.size() == std::size(kPackedKeys)) return false;
  if (!missing.empty()) {
    throw ValueError(fmt::format("Incomplete packed FlashAttention metadata; missing [{}]", fmt::join(missing, ", ")));
  }
  return true;
}

bool AttentionMetadataObj::wants_fp8_kv() const {
  const auto entry = fields.extra.Get(String("kv_cache_dtype"));
  if (!entry || *entry == nullptr) return false;
  const auto name = entry->as<String>();
  if (name && *name == "auto") return false;
  if (name && *name == "fp8") return true;
  throw ValueError(fmt::format("kv_cache_dtype is {}. Valid values are: 'auto', 'fp8'", option_text(*entry)));
}

std::int64_t AttentionMetadataObj::valid_kv_length(std::int64_t keys) const {
  const auto entry = fields.extra.Get(String("valid_kv_length"));
  if (!entry || *entry == nullptr) return keys;
  const auto length = entry->as<std::int64_t>();
  if (!length || *length < 0 || *length > keys) {
    throw ValueError(fmt::format("valid_kv_length must be within the K/V sequence, got {} for length {}",
                                 length ? std::to_string(*length) : "no integer", keys));
  }
  return *length;
}

std::shared_ptr<const KeyRanges> AttentionMetadataObj::key_ranges(const RangeRequest& request) const {
  const auto& spans = fields.full_attn_spans;
  if (!spans && !is_packed()) return nullptr;
  std::lock_guard lock(ranges_mutex_);
  if (!ranges_ || ranges_request_ != request) {
    ranges_ = std::make_shared<const KeyRanges>(spans ? span_ranges(*spans, fields.query_ranges, request)
                                                      : packed_ranges(fields, request));
    ranges_request_ = request;
  }
  return ranges_;
}

}  // namespace ditattn
