#pragma once

/// What every unit's launchers share. Included by .cu files alone.

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/launch.hpp"

namespace ditattn::kernels::cuda {

/// Throws std::runtime_error with CUDA's reason.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

/// Makes a device current, and the one before it again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace ditattn::kernels::cuda
