#pragma once

#include "kernels/cpu/attention_problem.hpp"
#include "kernels/cpu/cpu_level.hpp"

namespace ditattn::kernels::cpu {

/// Largest head size of sage_attention.
inline constexpr std::int64_t kSageMostHeadSize = 256;

struct SageOptions {
  bool wide_values = false;  ///< P · V in float32 instead of 8 bits
};

/// Quantized attention after SageAttention 2 (arXiv 2411.10958): Q · Kᵀ of 8-bit numbers with K less its channel means,
/// P · V of 8-bit numbers with P scaled per row and key block and V per channel and key block, sums in 32 bits. Where
/// the CPU multiplies bytes by `pmaddubsw` alone (AVX2, AVX-512 without VNNI), K and P have 7 bits. Masks are boolean
/// and the same for all rows and heads. Bits do not depend on the batch, on other rows or on the thread
/// count, but on all keys of a row's key blocks: a key that only other rows see (causal, packed sequences) may move the
/// scale of the 127 beside it. Throws std::bad_alloc before anything is written.
void sage_attention(const AttentionProblem& problem, const Executor& executor, CpuLevel level, SageOptions options);

struct TileKernel;

/// By a kernel that is in no level's table.
void sage_attention(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel);

}  // namespace ditattn::kernels::cpu
