#pragma once

/// What engines of others need of masks, in the forms they take: lengths as int32, a mask as what is added to logits.
/// Several tensors as one. And what they do not give: results where the caller wants them, zeros and −∞ for rows that
/// see no key.

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/sequences.hpp"

namespace ditattn::kernels::cuda {

/// int32 lengths of each batch entry: all rows, and the keys its segment's `lengths` leave (all where it has none).
void write_lengths(const AttentionProblem& problem, std::int32_t* query_lengths, std::int32_t* key_lengths,
                   const Launch& launch);

/// Copies the tokens of `segments`' queries, keys and values, of 2-byte elements in 16-byte pieces, into the contiguous
/// tensors of `joined`'s, and writes the mask of its segment 0, where it has one: all that lengths and masks hide.
void write_joined(const AttentionProblem& segments, const AttentionProblem& joined, const Launch& launch);

/// Where each sequence lies. Its int32 lengths; and in `offsets`, count + 1 for each of query, key, value and out, how
/// many elements come before its first token, and last before the end.
void write_sequences(const AttentionProblem& problem, const Sequences& sequences, std::int32_t* query_lengths,
                     std::int32_t* key_lengths, std::int64_t* offsets, const Launch& launch);

/// A mask's extents: 1 where it is broadcast over the batch, the heads or the rows.
struct BiasShape {
  std::int64_t batch = 1;
  std::int64_t heads = 1;
  std::int64_t rows = 1;
};
BiasShape bias_shape(const AttentionProblem& problem);

/// The narrowest type, of the problem's and float32, that has all of the mask's numbers.
ElementType bias_type(const AttentionProblem& problem);

/// The mask of segment 0 as (batch, heads, rows, keys) of `bias_shape` and `bias_type`, −∞ where it hides.
void write_bias(const AttentionProblem& problem, void* bias, const Launch& launch);

/// The log-sum-exp as an engine writes it: log-sum-exp = `factor` · element (batch, head, row), or, where there are
/// `sequences`, (sequence, head, its row).
struct EngineLse {
  const float* data = nullptr;
  Strides strides;
  float factor = 1;
  Sequences sequences = {};
};
/// `problem.lse` from an engine's.
void write_lse(const AttentionProblem& problem, const EngineLse& lse, const Launch& launch);

/// `problem.out`, of 2-byte elements, from a contiguous (batch, rows, heads, head_size).
void write_out(const AttentionProblem& problem, const void* out, const Launch& launch);

/// Zeros in `out` and −∞ in `lse` for rows without keys: those whose range is empty or, where there are no ranges,
/// which see none for segment 0's lengths and mask and the diagonal.
void finish_rows(const AttentionProblem& problem, const Launch& launch);

}  // namespace ditattn::kernels::cuda
