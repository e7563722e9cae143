#pragma once

#include "kernels/cpu/attention_problem.hpp"
#include "kernels/cpu/cpu_level.hpp"

namespace ditattn::kernels::cpu {

/// Exact attention by tiles with an online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv
/// 2205.14135): never holds more than a tile of logits. Computes in float32 whatever the element type. Each row's keys
/// are taken in the same order and blocks whatever the batch, the other rows and the thread count: results are
/// bit-identical. Throws std::bad_alloc before anything is written.
void flash_attention(const AttentionProblem& problem, const Executor& executor, CpuLevel level);

}  // namespace ditattn::kernels::cpu
