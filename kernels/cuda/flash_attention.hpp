#pragma once

#include <string>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"

namespace ditattn::kernels::cuda {

/// Exact attention on GPUs: on Hopper its own kernel where it was compiled for the head size and dtype and the tensors
/// can be copied by the hardware, else, from compute capability 8.0 on, that for mma.sync, else `sdpa_native`. One
/// launch; nothing is allocated or waited for, safe in graph capture. All pointers are device memory, also `lengths`
/// and `ranges`; `out_type` is `type`. Results are the same, bit for bit, from run to run and, of
/// tensors laid out alike, whatever the batch; what stands in hidden positions does not show. Thread-safe. Throws
/// std::runtime_error with CUDA's reason. `level`: the highest compute capability whose kernels may be taken, 90
/// for 9.0.
void flash_attention(const AttentionProblem& problem, const Launch& launch, int level);

/// The kernel that `flash_attention` takes on a GPU of this compute capability, 90 for 9.0, and why:
/// "flash_sm90, blocks of 64 keys" or "sdpa_native, for a head size above 256". Reads nothing that is pointed to;
/// `level` as there.
std::string flash_kernel_name(const AttentionProblem& problem, int compute_capability, int level);

/// What was compiled, for listings: "sm_80, sm_90a", "sm_80 (1 of 10 kernels)", or "plain".
std::string flash_kernels_built();

}  // namespace ditattn::kernels::cuda
