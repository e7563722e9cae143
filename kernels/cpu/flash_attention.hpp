#pragma once

#include "kernels/cpu/attention_problem.hpp"
#include "kernels/cpu/cpu_level.hpp"

namespace ditattn::kernels::cpu {

/// What the kernels may use.
struct CpuUnits {
  CpuLevel level{};       ///< the lowest
  bool bf16_dot = false;  ///< bfloat16 through the level's own dot product; otherwise widened to float32
};

/// The units for a level: the bfloat16 dot product where the level has it and, unless `always`, where it multiplies at
/// least 1.2 times as fast as float32, measured now (0.2 ms): there are CPUs where it runs at half the
/// rate.
CpuUnits choose_units(CpuLevel level, bool always);

/// Exact attention by tiles with an online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv
/// 2205.14135): never holds more than a tile of logits. Sums in float32 whatever the element type; with the bfloat16
/// dot product, probabilities are rounded to bfloat16 before they meet V. Each row's keys are taken in the same order
/// and blocks whatever the batch, the other rows and the thread count: results are bit-identical. Throws std::bad_alloc
/// before anything is written.
void flash_attention(const AttentionProblem& problem, const Executor& executor, CpuUnits units);

}  // namespace ditattn::kernels::cpu
