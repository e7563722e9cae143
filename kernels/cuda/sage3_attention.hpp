#pragma once

#include <cstdint>
#include <string>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/sage3.hpp"

namespace ditattn::kernels::cuda {

/// The architectures that there is a kernel for, and how it computes, as "sm_80 (emulated)"; empty if none was
/// compiled.
std::string sage3_kernels_built();

/// The kernel for a head size and dtype; empty if there is none. `capability`, here and below, is the compute
/// capability of whose kernels may be used (usable_capability), 90 for 9.0.
std::string sage3_kernel_name(std::int64_t head_size, ElementType type, int capability);

/// Bytes of scratch memory that a problem takes: in proportion to its tokens.
std::int64_t sage3_scratch_bytes(const AttentionProblem& problem, int capability);

/// Microscaled FP4 attention (SageAttention 3, arXiv 2505.11594) as docs/kernels/sage3.md defines it, with
/// products of NVFP4 where the GPU has them, else emulated with those of 16 bits, of a problem whose masks, if any, are
/// boolean and over keys alone, queued in a stream. Rows that are not finite are computed again, exactly. `scratch` is
/// memory of the device, at a multiple of 256 bytes. Nothing is allocated or waited for; thread-safe. Throws
/// std::runtime_error with CUDA's reason, or where no kernel was compiled.
void sage3_attention(const AttentionProblem& problem, Sage3Smoothing smoothing, int capability, char* scratch,
                     const Launch& launch);

}  // namespace ditattn::kernels::cuda
