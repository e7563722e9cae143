#pragma once

/// Errors of CUDA's runtime. Included by what is compiled with CUDA's headers alone.

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace ditattn::kernels::cuda {

/// Throws std::runtime_error with CUDA's reason.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

}  // namespace ditattn::kernels::cuda
