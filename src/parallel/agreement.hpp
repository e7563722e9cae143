#pragma once

/// Before anything moves: every rank tells what it was called with, and all come to the same answer.

#include <optional>
#include <string>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/communicator.hpp"
#include "parallel/block_metadata.hpp"

namespace ditattn::parallel {

/// What all ranks' calls come to.
struct Agreement {
  Sizes sizes;
  std::vector<std::int64_t> rows;  ///< the image's, by rank
  std::vector<std::int64_t> keys;
};

/// `layer` is the whole one. Checks this rank's tensors, then, with all ranks' sizes, the whole problem; `needs_lse`:
/// whether the back end has to return it for merging. Errors are those of `ParallelAttention::forward`.
Agreement agree(Communicator& communicator, const AttentionImpl& layer, const Tensor& query, const Tensor& key,
                const Tensor& value, const AttentionMetadata& metadata, const ForwardOutputs& outputs, bool needs_lse);

/// The part in `agree` of a rank that has no call to make.
void refuse(Communicator& communicator, const std::string& reason);

}  // namespace ditattn::parallel
