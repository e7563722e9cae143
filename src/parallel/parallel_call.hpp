#pragma once

/// One forward call on one rank, after all have agreed.

#include "parallel/agreement.hpp"
#include "parallel/exchange.hpp"
#include "parallel/heads.hpp"
#include "parallel/merge.hpp"

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
  std::vector<std::unique_ptr<AttentionImpl>>
      of_one_key;  ///< where the back end does not take a single key; else empty
  bool asked_of_one_key = false;
};

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
  void compute_whole(const KeysAndValues& keys, bool lse_wanted);
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
  [[nodiscard]] Range my_image(const Tensor& out) const;
  [[nodiscard]] Tensor floats(Slot slot, std::int64_t tokens, std::int64_t size) const;
  [[nodiscard]] Tensor like_query(Slot slot, std::int64_t tokens) const;

  LayerState& layer_;
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
