#pragma once

/// Queries, keys and values as FP8 (e4m3, OCP 8-bit Floating Point 1.0), each tensor with one scale, for engines that
/// multiply such.

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"

namespace ditattn::kernels::cuda {

/// What an engine is told of scales, in device memory. A stored number times `descale` is the number.
struct Fp8Scales {
  float query_descale;
  float key_descale;
  float value_descale;
  float probability_descale;
  float probability_scale;
  float out_scale;
  float largest_probability;  ///< the engine's
  float largest_out;          ///< the engine's
  unsigned largest[3];        ///< bits of the three tensors' largest numbers, on the way
};

/// Of probabilities, which are 1 at most: a power of two that leaves room below e4m3's largest number, 448.
inline constexpr float kFp8ProbabilityScale = 256;

/// Writes segment 0's tensors, of 2-byte elements in pieces of 16 bytes, as contiguous (batch, tokens, heads,
/// head_size), and `scales`: each tensor's largest finite number becomes 448, to which ±∞ are rounded too; the output's
/// scale is 1.
void write_fp8(const AttentionProblem& problem, void* query, void* key, void* value, Fp8Scales* scales,
               const Launch& launch);

}  // namespace ditattn::kernels::cuda
