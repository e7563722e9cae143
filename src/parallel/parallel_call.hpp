#pragma once

/// One forward call on one rank, after all have agreed.

#include "parallel/agreement.hpp"
#include "parallel/exchange.hpp"
#include "parallel/heads.hpp"

namespace ditattn::parallel {

/// This rank's implementations, by run of heads: not causal, and causal (null where the back end has no causal rule).
using RunImpls = std::vector<std::array<std::unique_ptr<AttentionImpl>, 2>>;

/// What a layer is on one rank.
struct LayerState {
  std::shared_ptr<ParallelGroup> group;
  std::unique_ptr<AttentionImpl> whole;
  Heads heads;                     ///< this rank's
  std::vector<Range> query_heads;  ///< by place on the first axis
  std::vector<Range> kv_heads;
  RunImpls runs;
};

class ParallelCall {
 public:
  ParallelCall(const LayerState& layer, GroupState& group, const Agreement& agreement,
               const AttentionMetadata& metadata);

  /// `outputs.out` is there.
  void run(const Tensor& query, const Tensor& key, const Tensor& value, const ForwardOutputs& outputs);

 private:
  /// Results for some rows and this rank's heads, token-major. `lse` (B, rows, heads, 1), or null.
  struct Rows {
    Tensor out;
    Tensor lse;
  };
  struct KeysAndValues {
    Tensor key;
    Tensor value;
  };

  KeysAndValues scatter(const Tensor& query, const Tensor& key, const Tensor& value);
  KeysAndValues keep(const Tensor& query, const Tensor& key, const Tensor& value);
  void compute_whole(const KeysAndValues& keys, bool lse_wanted);
  void compute_ring(const KeysAndValues& own);
  void compute_gathered(const KeysAndValues& own);
  void compute_text_keys();
  void compute_keys(std::size_t segment, const KeysAndValues& keys);
  void compute_part(const PlannedCall& planned, const Tensor& query, const KeysAndValues& keys, const Rows& into);
  void give_back(const ForwardOutputs& outputs);

  // Of the ranks that share this place on the second axis.
  [[nodiscard]] std::span<const std::int64_t> of_my_place(const std::vector<std::int64_t>& lengths) const;
  [[nodiscard]] KeysAndValues keys_in(char* memory, std::int64_t tokens) const;
  [[nodiscard]] Tensor floats(Slot slot, std::int64_t tokens, std::int64_t size) const;
  [[nodiscard]] Tensor like_query(Slot slot, std::int64_t tokens) const;

  const LayerState& layer_;
  GroupState& group_;
  const Agreement& agreement_;
  AttentionMetadata metadata_;
  int place_;  // on the second axis
  std::vector<Range> row_chunks_;
  std::vector<Range> key_chunks_;
  std::shared_ptr<const Plan> plan_;
  std::int64_t batch_;
  std::int64_t size_;
  DLDataType dtype_;
  DLDevice device_;
  std::array<Tensor, 2> queries_;  // text's, image's
  std::array<Rows, 2> rows_;       // the same
};

}  // namespace ditattn::parallel
