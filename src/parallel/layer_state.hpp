#pragma once

/// What a layer is on one rank, between calls.

#include <array>
#include <list>
#include <memory>
#include <utility>
#include <vector>

#include "ditattn/backend.hpp"
#include "parallel/group.hpp"
#include "parallel/heads.hpp"

namespace ditattn::parallel {

/// This rank's implementations, by run of heads: not causal, and causal (null where the back end has no causal rule).
using RunImpls = std::vector<std::array<std::unique_ptr<AttentionImpl>, 2>>;

/// The layer's heads, cut into parts.
struct CutHeads {
  std::vector<Heads> places;  ///< on the first axis
  Heads mine;                 ///< this rank's
  RunImpls runs;

  /// A part of all places.
  [[nodiscard]] std::vector<Range> query_heads(int part) const;
  [[nodiscard]] std::vector<Range> kv_heads(int part) const;
};

struct LayerState {
  LayerState(const BackendClass& backend, const ImplConfig& config, std::shared_ptr<ParallelGroup> parallel_group);

  /// Made when it is first asked for.
  const CutHeads& heads(Cut cut = {});

  std::shared_ptr<ParallelGroup> group;
  std::unique_ptr<AttentionImpl> whole;
  std::vector<std::unique_ptr<AttentionImpl>>
      of_one_key;  ///< where the back end does not take a single key; else empty
  bool asked_of_one_key = false;

 private:
  BackendClass backend_;
  std::list<std::pair<Cut, CutHeads>> cuts_;
};

}  // namespace ditattn::parallel
