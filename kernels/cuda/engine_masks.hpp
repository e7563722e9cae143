#pragma once

/// What engines of others need of masks, in the forms they take: lengths as int32, a mask as what is added to logits.
/// And what they do not promise: zeros and −∞ for rows that see no key.

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"

namespace ditattn::kernels::cuda {

/// int32 lengths of each batch entry: all rows, and the keys its segment's `lengths` leave (all where it has none).
void write_lengths(const AttentionProblem& problem, std::int32_t* query_lengths, std::int32_t* key_lengths,
                   const Launch& launch);

/// A mask's extents: 1 where it is broadcast over the batch or the heads.
struct BiasShape {
  std::int64_t batch = 1;
  std::int64_t heads = 1;
};
BiasShape bias_shape(const AttentionProblem& problem);

/// The mask of segment 0 as float32 (batch, heads, rows, keys) of `bias_shape`, −∞ where it hides. `empty_rows`, one
/// byte per row of that shape, tells the rows that see no key, the causal diagonal counted (a mask has no lengths);
/// their bias is 0.
void write_bias(const AttentionProblem& problem, float* bias, std::uint8_t* empty_rows, const Launch& launch);

/// Zeros in `out` and −∞ in `lse` for rows without keys: those of `empty_rows` (null: none), and all of batch entries
/// of length 0. Copies `packed_lse`, contiguous (batch, heads, rows), to `problem.lse` first where it is not null.
void finish_rows(const AttentionProblem& problem, const std::uint8_t* empty_rows, const float* packed_lse,
                 const Launch& launch);

}  // namespace ditattn::kernels::cuda
