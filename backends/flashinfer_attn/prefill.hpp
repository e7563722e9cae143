#pragma once

/// FlashInfer's prefill kernels, compiled ahead of time: what is built, and how to call it. The units behind this
/// header know FlashInfer; all else knows numbers and pointers.

#include <cstdint>
#include <span>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/sequences.hpp"

namespace ditattn::flashinfer_attn {

/// FlashInfer's kernels after FlashAttention-2 (compute capability 8.0 up) and -3 (9.0 alone).
enum class Engine : std::uint8_t { fa2, hopper };

/// What a kernel hides: keys past the lengths alone; keys past the diagonal too (bottom-right, without lengths); or all
/// that the problem says, read element by element.
enum class Masking : std::uint8_t { none, causal, custom };

/// Device memory of one launch.
struct PrefillMemory {
  void* out = nullptr;                 ///< contiguous (batch, rows, heads, head_size) for fa2; else by `out_strides`
  kernels::Strides out_strides;        ///< batch = rows · token
  float* lse = nullptr;                ///< contiguous (batch, rows, heads), to base 2; null: not wanted
  std::int32_t* plan = nullptr;        ///< `plan_entries` of them for fa2
  kernels::cuda::Sequences sequences;  ///< none: batch entries
};

/// Queues one launch over all batch entries or sequences. Batch entries must follow each other: batch strides of Q, K
/// and V are their lengths times their token strides. Rows of no sequence are not written. Of the problem, its outputs
/// are not looked at. The device is current. Throws std::runtime_error with CUDA's or FlashInfer's reason.
using Prefill = void (*)(const kernels::AttentionProblem& problem, const PrefillMemory& memory,
                         const kernels::cuda::Launch& launch);

/// A kernel that was built.
struct BuiltPrefill {
  Engine engine;
  std::int64_t head_size;
  kernels::ElementType type;
  Masking masking;
  Prefill run;
};

/// All of them: what the build's options chose.
std::span<const BuiltPrefill> built_prefills();

/// Makes the device current and runs.
void run_prefill(const BuiltPrefill& prefill, const kernels::AttentionProblem& problem, const PrefillMemory& memory,
                 const kernels::cuda::Launch& launch);

/// How many numbers fa2's plan has.
std::int64_t plan_entries(const kernels::AttentionProblem& problem, const kernels::cuda::Sequences& sequences);

template <std::int64_t kHeadSize, kernels::ElementType kType, Masking kMasking>
void fa2_prefill(const kernels::AttentionProblem& problem, const PrefillMemory& memory,
                 const kernels::cuda::Launch& launch);
template <std::int64_t kHeadSize, kernels::ElementType kType, Masking kMasking>
void hopper_prefill(const kernels::AttentionProblem& problem, const PrefillMemory& memory,
                    const kernels::cuda::Launch& launch);

}  // namespace ditattn::flashinfer_attn
