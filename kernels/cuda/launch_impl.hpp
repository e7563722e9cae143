#pragma once

/// What every unit's launchers share. Included by .cu files alone.

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/launch.hpp"

namespace ditattn::kernels::cuda {

/// Makes a device current, with its context, which a thread that did nothing with CUDA yet lacks and cuDNN and the
/// driver do not make; and the one before it again.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_;
  int before_ = 0;
};

}  // namespace ditattn::kernels::cuda
