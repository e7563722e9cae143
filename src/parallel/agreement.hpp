#pragma once

/// Before anything moves: every rank tells what it was called with, and all come to the same answer.

#include <array>
#include <cstdint>
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
  std::int64_t multiprocessors = 0;  ///< of the smallest GPU; 0: moving takes them from what computes, or CPUs
};

/// What a rank was called with, as numbers: what it tells the others.
using CallNumbers = std::array<std::int64_t, 18>;

/// How many kinds of call are kept.
inline constexpr std::size_t kKeptKinds = 16;  // of a model's attention, at a few resolutions

/// The last few agreements of a group on a GPU. Ranks that made such a call before take it that all make it again:
/// asking each time would make the host wait for the GPU, and cannot be captured into a graph.
class AgreementCache {
 public:
  [[nodiscard]] const Agreement* find(const CallNumbers& numbers) const;
  [[nodiscard]] bool empty() const { return entries_.empty(); }
  void add(const CallNumbers& numbers, const Agreement& agreement);

 private:
  struct Entry {
    CallNumbers numbers;
    Agreement agreement;
  };
  std::vector<Entry> entries_;
};

/// `layer` is the whole one. Checks this rank's tensors, then, with all ranks' sizes, the whole problem; `needs_lse`:
/// whether the back end has to return it for merging. Errors are those of `ParallelAttention::forward`.
Agreement agree(Communicator& communicator, AgreementCache& cache, const AttentionImpl& layer, const Tensor& query,
                const Tensor& key, const Tensor& value, const AttentionMetadata& metadata,
                const ForwardOutputs& outputs, bool needs_lse);

/// The part in `agree` of a rank that has no call to make.
void refuse(Communicator& communicator, const std::string& reason);

}  // namespace ditattn::parallel
