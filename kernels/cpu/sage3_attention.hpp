#pragma once

#include "kernels/cpu/attention_problem.hpp"
#include "kernels/cpu/flash_attention.hpp"
#include "kernels/sage3.hpp"

namespace ditattn::kernels::cpu {

/// Largest head size of sage3_attention.
inline constexpr std::int64_t kSage3MostHeadSize = 256;

struct TileKernel;

/// Microscaled FP4 attention (SageAttention 3, arXiv 2505.11594) as docs/kernels/sage3.md defines it, emulated: numbers
/// are rounded to NVFP4 and multiplied in float32, or, where `units` say so, as bfloat16, which holds each of
/// them exactly. Masks are boolean and the same for all rows and heads. Bits do not depend on the batch
/// or on the thread count, but, by means and scales, on all rows and keys of a head. Throws std::bad_alloc before
/// anything is written.
void sage3_attention(const AttentionProblem& problem, const Executor& executor, CpuUnits units,
                     Sage3Smoothing smoothing);

/// By a kernel that is in no level's table.
void sage3_attention(const AttentionProblem& problem, const Executor& executor, const TileKernel& kernel,
                     Sage3Smoothing smoothing);

}  // namespace ditattn::kernels::cpu
