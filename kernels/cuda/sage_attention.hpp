#pragma once

#include <cstdint>
#include <string>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/sage_quantize.hpp"

namespace ditattn::kernels::cuda {

/// The architectures that there is a kernel for, as "sm_90a"; empty if none was compiled.
std::string sage_kernels_built();

/// Whether a GPU of this compute capability, 90 for 9.0, has a kernel.
bool has_sage(std::int64_t compute_capability);

/// The kernel for a head size and dtype; empty if none was compiled.
std::string sage_kernel_name(std::int64_t head_size, ElementType type);

/// Bytes of scratch memory that a problem takes.
std::int64_t sage_scratch_bytes(const AttentionProblem& problem);

/// Quantized attention (SageAttention 2, arXiv 2411.10958) of a problem whose masks, if any, are boolean and over keys
/// alone, that there is a kernel for, queued in a stream. Rows that are not finite are computed again, exactly.
/// `scratch` is memory of the device, at a multiple of 256 bytes. Nothing is allocated or waited for; thread-safe.
/// Throws std::runtime_error with CUDA's reason.
void sage_attention(const AttentionProblem& problem, const SageQuantization& quantization, char* scratch,
                    const Launch& launch);

}  // namespace ditattn::kernels::cuda
