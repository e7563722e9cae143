#pragma once

/// What FlashInfer's ragged kernel is told of which block does what.

#include <cstdint>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/sequences.hpp"

namespace ditattn::flashinfer_attn {

/// Device arrays.
struct Fa2Plan {
  std::int32_t* first_rows;  ///< per batch entry or sequence
  std::int32_t* first_keys;  ///< per batch entry or sequence
  std::int32_t* entries;     ///< per block: its batch entry or sequence
  std::int32_t* tiles;       ///< per block: its query tile
  std::int32_t* zeros;       ///< per block: keys are not split
  std::int32_t* chunk_size;  ///< one number: all keys
  bool* valid;               ///< per block: whether it has any rows
  std::int64_t blocks;       ///< per K/V head
};

/// Queues what fills `memory` (`plan_entries` numbers) for tiles of `tile` query rows, those of a K/V head's group
/// counted one by one.
Fa2Plan write_fa2_plan(const kernels::AttentionProblem& problem, const kernels::cuda::Sequences& sequences,
                       std::int64_t tile, std::int32_t* memory, const kernels::cuda::Launch& launch);

}  // namespace ditattn::flashinfer_attn
