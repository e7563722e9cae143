#pragma once

/// The quantized kernels for mma.sync as their units, one per dtype, give them to the launcher.

#include <vector>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/flash_device.hpp"
#include "kernels/cuda/sage_quantize.hpp"

namespace ditattn::kernels::cuda {

/// What is compiled, each for head sizes above the one before. CMake reads the line.
constexpr int kSageSm80HeadSizes[] = {64, 96, 128, 256};
constexpr int kSageSm80Keys = 64;  // of a block

constexpr int kFp8Capability = 89;  // the first whose products are of e4m3 too

struct SageSm80Function {
  const void* function;  ///< __global__, of SageSm80Arguments
  int shared_bytes;
};

struct SageSm80Kernel {
  int head_size;  ///< takes those up to this one
  int rows;       ///< of a tile
  ElementType type;
  SageSm80Function wide;   ///< Q and K whole numbers, V and P in float16
  SageSm80Function bytes;  ///< V and P in e4m3: from compute capability 8.9 on, as the next
  SageSm80Function fp8;    ///< all in e4m3
};

/// Compiled in the unit of this dtype alone, head sizes ascending.
template <ElementType kType>
std::vector<SageSm80Kernel> sage_sm80_kernels();

/// Of all dtypes that were compiled, the same at every call.
const std::vector<SageSm80Kernel>& built_sage_sm80();

/// Null where none was compiled for the problem's head size and dtype.
const SageSm80Kernel* find_sage_sm80(const AttentionProblem& problem);

/// What the kernel takes its operands from.
SageShape shape_of(const SageSm80Kernel& kernel, const SageQuantization& quantization);

/// One launch on the current device, which is `device`, in a cudaStream_t, after `images` were filled there. Nothing is
/// allocated or waited for; thread-safe. Throws std::runtime_error with CUDA's reason.
void launch_sage_sm80(const SageSm80Kernel& kernel, const AttentionProblem& problem, const SageImages& images,
                      const SageQuantization& quantization, FlashDevice& device, void* stream);

}  // namespace ditattn::kernels::cuda
