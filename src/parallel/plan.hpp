#pragma once

/// What a rank computes in one call of a layer, worked out from sizes and metadata, and kept: layers that share their
/// metadata share the plan.

#include <array>
#include <memory>
#include <vector>

#include "parallel/block_metadata.hpp"

namespace ditattn::parallel {

/// Everything a plan depends on.
struct PlanRequest {
  AttentionMetadata metadata;
  Sizes sizes;
  std::vector<Range> row_chunks;  ///< the image's rows of each place on the second axis
  std::vector<Range> key_chunks;  ///< the image's keys that come together, step by step
  int place = 0;                  ///< this rank's on the second axis
  std::vector<HeadRun> heads;     ///< of this rank
  bool causal = false;
  CausalAlignment alignment = CausalAlignment::bottom_right;
};
bool same(const PlanRequest& a, const PlanRequest& b);

struct PlannedCall {
  BlockCall block;
  std::size_t run;  ///< of `PlanRequest::heads`
  AttentionMetadata metadata;
};

/// Where there is one chunk, the whole call for each run of heads. Else parts of it: rows are the text's of this place,
/// then the image's; keys the text's, then those of each chunk.
struct Plan {
  std::vector<AttentionMetadata> whole;
  std::array<Segment, 2> rows;
  std::vector<Segment> keys;
  std::vector<std::array<std::vector<PlannedCall>, 2>> calls;  ///< by keys, by rows
};

/// Throws what `AttentionMetadataObj::key_ranges` throws.
Plan make_plan(const PlanRequest& request);

/// The last few plans.
class PlanCache {
 public:
  std::shared_ptr<const Plan> get(const PlanRequest& request);

 private:
  struct Entry {
    PlanRequest request;
    std::shared_ptr<const Plan> plan;
  };
  std::vector<Entry> entries_;
};

}  // namespace ditattn::parallel
