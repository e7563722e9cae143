#pragma once

/// One forward call on one rank, after all have agreed.

#include "parallel/agreement.hpp"
#include "parallel/exchange.hpp"
#include "parallel/layer_state.hpp"
#include "parallel/merge.hpp"

namespace ditattn::parallel {

/// Over a ring or gathered keys, with heads shared out before where there is a first axis.
class ParallelCall {
 public:
  ParallelCall(LayerState& layer, GroupState& group, const Agreement& agreement, const AttentionMetadata& metadata);

  /// `outputs.out` is there.
  void run(const Tensor& query, const Tensor& key, const Tensor& value, const ForwardOutputs& outputs);

 private:
  /// Some rows and this rank's heads, whose results come in parts. `result.lse` may be null in the end.
  struct Rows {
    Part result;            ///< in the call's dtype
    Tensor sums;            ///< in float32, while there are parts to come
    Tensor first;           ///< the first part, where a second comes
    std::size_t parts = 0;  ///< to come
    std::size_t merged = 0;
    bool parts_are_whole = true;  ///< each has all rows and heads
  };
  struct KeysAndValues {
    Tensor key;
    Tensor value;
  };

  KeysAndValues scatter(const Tensor& query, const Tensor& key, const Tensor& value);
  KeysAndValues keep(const Tensor& query, const Tensor& key, const Tensor& value);
  void compute_ring(const KeysAndValues& own);
  void compute_gathered(const KeysAndValues& own);
  void compute_text_keys();
  void compute_keys(std::size_t segment, const KeysAndValues& keys);
  void prepare(std::size_t segment, const Tensor& out, Slot lse);
  void compute_part(const PlannedCall& planned, const Tensor& query, const KeysAndValues& keys, Rows& rows);
  void compute(const PlannedCall& planned, const Tensor& query, const KeysAndValues& keys, const Part& into);
  void finish(const Rows& rows);
  const AttentionImpl& impl_for(const PlannedCall& planned);
  void give_back(const ForwardOutputs& outputs);

  // Of the ranks that share this place on the second axis.
  [[nodiscard]] std::span<const std::int64_t> of_my_place(const std::vector<std::int64_t>& lengths) const;
  [[nodiscard]] KeysAndValues keys_in(char* memory, std::int64_t tokens) const;
  [[nodiscard]] Tensor floats(Slot slot, std::int64_t tokens, std::int64_t size) const;
  [[nodiscard]] Tensor like_query(Slot slot, std::int64_t tokens) const;

  LayerState& layer_;
  const CutHeads& heads_;
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
