#pragma once

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "ditattn/parallel.hpp"
#include "parallel/agreement.hpp"
#include "parallel/plan.hpp"

namespace ditattn::parallel {

/// What calls keep between them.
enum class Slot : std::uint8_t {
  query_sent,
  query,
  key_sent,
  key,
  value_sent,
  value,
  keys_and_values,
  next_keys_and_values,
  last_keys_and_values,
  part_out,
  part_lse,
  text_out,
  text_lse,
  image_out,
  image_lse,
  text_first,
  image_first,
  text_rounded,
  image_rounded,
  received,
  received_lse,
  received_text,
  received_text_lse,
  count
};

/// Memory of one device at a time, by purpose, kept, as large as the largest. All of it is such that a communicator
/// likes to receive into.
class Workspace {
 public:
  /// Where memory is from now on, and whose it is.
  void use(DLDevice device, Communicator& communicator);

  /// `bytes` at least, not initialised. Parts of heads, which are under way together, have memory of their own.
  char* get(Slot slot, std::int64_t bytes, int part = 0);

 private:
  DLDevice device_ = kCpu;
  Communicator* communicator_ = nullptr;
  bool captured_ = false;  // whether a graph has recorded addresses
  std::array<Tensor, static_cast<std::size_t>(Slot::count) * kMostParts> memory_;
  std::vector<Tensor> of_graphs_;  // outgrown, and still written when they are replayed
};

struct GroupState {
  std::shared_ptr<Communicator> all;
  Mesh mesh;
  std::shared_ptr<Communicator> ulysses;  ///< ranks that share a chunk of tokens
  std::shared_ptr<Communicator> second;   ///< ranks that share heads
  Workspace workspace;
  PlanCache plans;
  AgreementCache agreements;
  std::optional<Cut> cut;  ///< of a rank's heads, where a test chooses it
};

struct GroupAccess {
  static GroupState& state(const ParallelGroup& group) { return *group.state_; }
};

}  // namespace ditattn::parallel
