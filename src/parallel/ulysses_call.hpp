#pragma once

/// One forward call on one rank, after all have agreed, where heads alone are shared out.
///
/// Heads go in parts: all that they need is sent at once, part after part, each part is computed when it has come, and
/// its results go back while the next is computed. What stays on this rank goes with the first part, for which the GPU
/// waits anyway. Batches of a communicator follow each other, so no result waits for an input that another rank sends
/// later.

#include "parallel/agreement.hpp"
#include "parallel/exchange.hpp"
#include "parallel/layer_state.hpp"
#include "parallel/merge.hpp"

namespace ditattn::parallel {

class UlyssesCall {
 public:
  /// `heads` are the layer's, in as many parts on all ranks.
  UlyssesCall(const LayerState& layer, const CutHeads& heads, GroupState& group, const Agreement& agreement,
              const AttentionMetadata& metadata);

  /// `outputs.out` is there.
  void run(const Tensor& query, const Tensor& key, const Tensor& value, const ForwardOutputs& outputs);

 private:
  /// All tokens of a part's heads.
  struct Input {
    Tensor query;
    Tensor key;
    Tensor value;
    std::unique_ptr<Pending> pending;
  };

  Input add(int part, HeadScatter& batch, const Tensor& query, const Tensor& key, const Tensor& value);
  Part compute(int part, const std::vector<Input>& inputs, bool lse_wanted);
  HeadGather gather(int part, const Part& result, const ForwardOutputs& outputs);

  const LayerState& layer_;
  const CutHeads& heads_;
  GroupState& group_;
  const Agreement& agreement_;
  std::shared_ptr<const Plan> plan_;
};

}  // namespace ditattn::parallel
