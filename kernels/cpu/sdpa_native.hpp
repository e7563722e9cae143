#pragma once

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu {

/// Attention as PyTorch's "math" path defines it: all logits of a row, then softmax, then the product with V, in
/// float32. Portable C++ for any head size. Logits of one block of query rows are in memory at a time.
/// Throws std::bad_alloc where scratch memory cannot be had; nothing is written then.
void sdpa_native(const AttentionProblem& problem, const Executor& executor);

}  // namespace ditattn::kernels::cpu
