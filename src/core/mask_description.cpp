#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ditattn/cuda.hpp"
#include "ditattn/log.hpp"
#include "ditattn/metadata.hpp"

namespace ditattn {
namespace {

// A mask as a grid of rows of keys; reads "hidden?" and "neutral?" of an element.
class MaskReader {
 public:
  explicit MaskReader(const Tensor& mask)
      : data_(data_pointer(mask)), dtype_(mask.dtype()), step_(mask.stride(-1)), keys_(mask.size(-1)) {}

  [[nodiscard]] std::int64_t keys() const { return keys_; }

  // Length of the prefix of seen keys where row `offset` is a prefix followed by hidden keys alone; −1 otherwise.
  [[nodiscard]] std::int64_t prefix_length(std::int64_t offset) const {
    if (is_bool() && step_ == 1) return prefix_length_of_bytes(static_cast<const unsigned char*>(data_) + offset);
    std::int64_t length = 0;
    while (length < keys_ && sees_fully(offset + length * step_)) ++length;
    for (std::int64_t key = length; key < keys_; ++key) {
      if (!hides(offset + key * step_)) return -1;
    }
    return length;
  }

 private:
  // The common case, a whole score matrix of bytes, at memory speed.
  [[nodiscard]] std::int64_t prefix_length_of_bytes(const unsigned char* row) const {
    const auto* hidden = static_cast<const unsigned char*>(std::memchr(row, 0, static_cast<std::size_t>(keys_)));
    if (hidden == nullptr) return keys_;
    return std::any_of(hidden, row + keys_, [](unsigned char value) { return value != 0; }) ? -1 : hidden - row;
  }
  [[nodiscard]] bool is_bool() const { return dtype_ == kBool; }
  [[nodiscard]] bool sees_fully(std::int64_t index) const {
    const double value = load_element(data_, index, dtype_);
    return is_bool() ? value != 0 : value == 0;
  }
  [[nodiscard]] bool hides(std::int64_t index) const {
    const double value = load_element(data_, index, dtype_);
    return is_bool() ? value == 0 : std::isinf(value) && value < 0;
  }

  const void* data_;
  DLDataType dtype_;
  std::int64_t step_;
  std::int64_t keys_;
};

// Rows of the mask are those of its dimensions between batch and keys that are not broadcast.
MaskDescription describe(const Tensor& mask) {
  const int rank = mask.ndim();
  if (rank < 1 || rank > 4 || mask.device().device_type != kDLCPU || mask.numel() == 0) {
    return {.kind = MaskDescription::Kind::dense};
  }

  const MaskReader reader(mask);
  const bool has_batch = rank == 2 || rank == 4;
  const std::int64_t batches = has_batch ? mask.size(0) : 1;
  const auto extent = [&](int from_end) {  // of a middle dimension: 2 = query, 3 = head
    return rank > 2 && from_end <= rank && !(has_batch && from_end == rank) && mask.stride(-from_end) != 0
               ? mask.size(-from_end)
               : std::int64_t{1};
  };
  std::vector<std::int64_t> lengths;
  for (std::int64_t batch = 0; batch < batches; ++batch) {
    std::int64_t common = -1;
    for (std::int64_t head = 0; head < extent(3); ++head) {
      for (std::int64_t row = 0; row < extent(2); ++row) {
        std::int64_t offset = has_batch ? batch * mask.stride(0) : 0;
        if (rank > 2) offset += row * mask.stride(-2) + (rank > 3 || !has_batch ? head * mask.stride(-3) : 0);
        const std::int64_t length = reader.prefix_length(offset);
        if (length < 0 || (common >= 0 && length != common)) return {.kind = MaskDescription::Kind::dense};
        common = length;
      }
    }
    lengths.push_back(common);
  }
  if (std::ranges::all_of(lengths, [&](std::int64_t length) { return length == reader.keys(); })) return {};
  // One mask key that stands for all keys: "seen" is then no prefix of one. Two dimensions are (batch, keys) as they
  // are.
  if (reader.keys() == 1 && rank != 2 && std::ranges::count(lengths, 1) > 0) {
    return {.kind = MaskDescription::Kind::dense};
  }
  return {.kind = MaskDescription::Kind::key_prefix, .kv_lengths = std::move(lengths)};
}

// vLLM-Omni's SDPA takes a padding mask of any dtype for boolean; here floats are added, and one of 0 and 1 alone would
// hide nothing without anybody noticing.
void warn_of_zeros_and_ones(const Tensor& mask) {
  if (mask.ndim() != 2 || mask.dtype() == kBool || mask.device().device_type != kDLCPU) return;
  bool has_zero = false;
  bool has_one = false;
  for (std::int64_t i = 0; i < mask.numel(); ++i) {
    const std::int64_t at = i / mask.size(1) * mask.stride(0) + i % mask.size(1) * mask.stride(1);
    const double value = load_element(data_pointer(mask), at, mask.dtype());
    if (value != 0 && value != 1) return;
    (value == 0 ? has_zero : has_one) = true;
  }
  if (!has_zero || !has_one) return;
  log(LogLevel::warning,
      fmt::format("A mask of shape {} and dtype {} holds only 0 and 1: it is added to the logits and "
                  "hides nothing. Give bool (true = attend) for a padding mask.",
                  shape_name(mask), dtype_name(mask.dtype())));
}

// vLLM-Omni's hint "arbitrary": the mask is read element by element, and nobody looks at it, or waits for it, first.
// "none" and "padding" would have to be believed.
bool is_not_to_be_looked_at(const MetadataExtra& extra) {
  const auto mode = extra.Get(tvm::ffi::String("attention_mask_mode"));
  const auto text = mode ? mode->as<tvm::ffi::String>() : std::nullopt;
  return text && *text == "arbitrary";
}

const MaskDescription& described(const tvm::ffi::Optional<Tensor>& mask, const MetadataExtra& extra,
                                 std::once_flag& once, MaskDescription& description) {
  std::call_once(once, [&] {
    if (!mask.has_value()) return;
    if (is_not_to_be_looked_at(extra)) {
      description.kind = MaskDescription::Kind::dense;
      return;
    }
    const bool on_gpu = mask.value().device().device_type == kDLCUDA;
    const Tensor on_host = on_gpu ? copy_to(mask.value(), kCpu) : mask.value();
    description = describe(on_host);
    warn_of_zeros_and_ones(on_host);
  });
  return description;
}

}  // namespace

const MaskDescription& AttentionMetadataObj::mask_description() const {
  return described(fields.attn_mask, fields.extra, mask_.once, mask_.description);
}

const MaskDescription& AttentionMetadataObj::joint_mask_description() const {
  return described(fields.joint_attn_mask, fields.extra, joint_mask_.once, joint_mask_.description);
}

}  // namespace ditattn
