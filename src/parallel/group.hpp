#pragma once

#include <array>
#include <memory>
#include <vector>

#include "ditattn/parallel.hpp"
#include "parallel/plan.hpp"

namespace ditattn::parallel {

/// What calls keep between them.
enum class Slot : std::uint8_t {
  query_sent,
  query,
  key_sent,
  value_sent,
  keys_and_values,
  next_keys_and_values,
  last_keys_and_values,
  part_out,
  part_lse,
  text_out,
  text_lse,
  image_out,
  image_lse,
  text_rounded,
  image_rounded,
  received,
  count
};

/// Host memory by purpose, kept, as large as the largest.
class Workspace {
 public:
  /// `bytes` at least, not initialised.
  char* get(Slot slot, std::int64_t bytes) {
    Tensor& memory = memory_[static_cast<std::size_t>(slot)];
    if (!memory.defined() || memory.numel() < bytes) {
      memory = Tensor();  // freed first
      memory = empty({bytes}, kBool);
    }
    return static_cast<char*>(memory.data_ptr());
  }

 private:
  std::array<Tensor, static_cast<std::size_t>(Slot::count)> memory_;
};

struct GroupState {
  std::shared_ptr<Communicator> all;
  Mesh mesh;
  std::shared_ptr<Communicator> ulysses;  ///< ranks that share a chunk of tokens
  std::shared_ptr<Communicator> second;   ///< ranks that share heads
  Workspace workspace;
  PlanCache plans;
};

}  // namespace ditattn::parallel
