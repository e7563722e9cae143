#pragma once

#include <cstdint>
#include <string>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/sage_quantize.hpp"

namespace ditattn::kernels::cuda {

/// The architectures that there is a kernel for, as "sm_80, sm_90a"; empty if none was compiled.
std::string sage_kernels_built();

/// What a GPU computes with where nothing else is said: V in e4m3 where it has products of that. `capability`, here
/// and below, is the compute capability of whose kernels may be used (usable_capability), 90 for 9.0.
SageQuantization sage_defaults(int capability);

/// The kernel for a head size and dtype, with the defaults; empty if there is none.
std::string sage_kernel_name(std::int64_t head_size, ElementType type, int capability);

/// Bytes of scratch memory that a problem takes.
std::int64_t sage_scratch_bytes(const AttentionProblem& problem, const SageQuantization& quantization, int capability);

/// Quantized attention (SageAttention 2, arXiv 2411.10958) of a problem whose masks, if any, are boolean and over keys
/// alone, that there is a kernel for, queued in a stream. e4m3 takes a capability of 89, and is not for Q and K where
/// V is in float16. Rows that are not finite are computed again, exactly. `scratch` is memory of the device, at a
/// multiple of 256 bytes. Nothing is allocated or waited for; thread-safe. Throws std::runtime_error with CUDA's
/// reason.
void sage_attention(const AttentionProblem& problem, const SageQuantization& quantization, int capability,
                    char* scratch, const Launch& launch);

}  // namespace ditattn::kernels::cuda
