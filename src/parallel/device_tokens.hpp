#pragma once

/// What is done to tokens that lie in a GPU's memory: functions of `ditattn_nccl`, which needs nvcc to be built, opened
/// beside this library when the first such tensors come. Shapes and dtypes are as in tokens.hpp and merge.hpp; work is
/// queued in this thread's current stream.

#include <span>

#include "ditattn/export.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn::parallel {

struct TokenCopy;
struct Part;

struct DeviceTokens {
  void (*copy)(std::span<const TokenCopy> copies);
  void (*merge)(const Part& to, const Part& a, const Part& b);
  void (*clear)(const Part& part);
  void (*convert)(const Tensor& to, const Tensor& from);
};

/// NotImplementedError where it was not built, or for a device that is no GPU of NVIDIA's.
DITATTN_API const DeviceTokens& device_tokens(DLDevice device);

}  // namespace ditattn::parallel

/// What `ditattn_nccl` has.
extern "C" DITATTN_API const ditattn::parallel::DeviceTokens* ditattn_device_tokens();
