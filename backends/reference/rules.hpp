#pragma once

#include <ditattn/backend.hpp>

#include <cstdint>
#include <optional>
#include <vector>

namespace ditattn::reference {

/// A position among tokens that may lie in two tensors, the text's and the image's.
struct Place {
  bool joint;
  std::int64_t index;
};

/// The contract's rules, read off the metadata literally, one (row, key) at a time: which keys a row sees and what the
/// masks add. Independent of the library's own plan of a call on purpose.
class Rules {
 public:
  Rules(const Tensor& query, const Tensor& key, const AttentionMetadata& metadata, bool causal,
        CausalAlignment alignment);

  [[nodiscard]] std::int64_t rows() const { return image_rows_ + joint_rows_; }
  [[nodiscard]] std::int64_t keys() const { return image_keys_ + joint_keys_; }
  [[nodiscard]] Place row_place(std::int64_t row) const { return place(row, image_rows_, joint_rows_); }
  [[nodiscard]] Place key_place(std::int64_t key) const { return place(key, image_keys_, joint_keys_); }

  /// Whether spans, packing or causality let the row see the key.
  [[nodiscard]] bool sees(std::int64_t batch, std::int64_t row, std::int64_t key) const;
  /// What the masks add to the logit; −∞ hides.
  [[nodiscard]] double added(std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t key) const;

 private:
  [[nodiscard]] Place place(std::int64_t position, std::int64_t image, std::int64_t joint) const;
  [[nodiscard]] bool sees_in_spans(const std::vector<std::vector<Span>>& samples, std::int64_t batch, std::int64_t row,
                                   std::int64_t key) const;
  [[nodiscard]] bool sees_in_pack(std::int64_t batch, std::int64_t row, std::int64_t key) const;
  [[nodiscard]] double element(const Tensor& mask, std::int64_t batch, std::int64_t head, std::int64_t row,
                               std::int64_t column) const;

  const AttentionMetadataFields* fields_ = nullptr;
  std::int64_t batch_;
  std::int64_t heads_;
  std::int64_t image_rows_;
  std::int64_t image_keys_;  // valid ones
  std::int64_t mask_keys_;   // image columns of a mask: all keys, valid or not
  std::int64_t joint_rows_ = 0;
  std::int64_t joint_keys_ = 0;
  bool joint_first_ = false;
  bool causal_;
  CausalAlignment alignment_;
  std::vector<std::int64_t> cu_q_;  // empty: not packed
  std::vector<std::int64_t> cu_k_;
};

}  // namespace ditattn::reference
