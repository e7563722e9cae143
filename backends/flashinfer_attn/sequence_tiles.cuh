#pragma once

// Which of packed sequences a block works on. Background: a grid of (sequence, tile of the longest) is mostly empty
// where lengths differ. Approach: sequence s has the blocks from ⌊first row / tile⌋ + s on, which are enough, as its last
// tile alone may not be whole; few of all ⌊rows / tile⌋ + sequences are left over. Rejected: a sum over the lengths, which
// a kernel would have to work out before each launch.

#include <cstdint>

#include "kernels/cuda/sequences.hpp"

namespace ditattn::flashinfer_attn {

/// Blocks for tiles of `tile` rows, over a problem of `rows` rows in all batch entries. Rows here and below are `group`
/// for each of the problem's.
inline std::int64_t sequence_blocks(const kernels::cuda::Sequences& sequences, std::int64_t rows, std::int64_t group,
                                    std::int64_t tile) {
  return rows * group / tile + sequences.count;
}

struct SequenceTile {
  std::int32_t sequence;
  std::int32_t tile;
  bool valid;  ///< false: a block that is left over
};

__device__ inline SequenceTile sequence_tile(const kernels::cuda::Sequences& sequences, std::int64_t group,
                                             std::int64_t tile, std::int64_t block) {
  const auto first_block = [&](std::int64_t s) {
    return (sequences.numbers[4 * s] - sequences.rows_before) * group / tile + s;
  };
  std::int64_t low = 0;
  for (std::int64_t high = sequences.count - 1; low < high;) {  // the last sequence that starts at the block or before
    const std::int64_t middle = (low + high + 1) / 2;
    if (first_block(middle) <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const std::int64_t of_sequence = block - first_block(low);
  const bool valid = of_sequence >= 0 && of_sequence * tile < sequences.numbers[4 * low + 1] * group;
  return {static_cast<std::int32_t>(low), static_cast<std::int32_t>(valid ? of_sequence : 0), valid};
}

}  // namespace ditattn::flashinfer_attn
