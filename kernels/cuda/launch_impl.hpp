#pragma once

/// What every unit's launchers share. Included by what is compiled with CUDA's headers alone.

#include <cstdint>

#include "kernels/cuda/check_impl.hpp"
#include "kernels/cuda/launch.hpp"

namespace ditattn::kernels::cuda {

/// Makes a device current, and the one before it again. A thread's first time makes its context too, which cuDNN and
/// the driver need and do not make.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    static thread_local int last = -1;
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device && last == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    last = device;
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

/// Launches a kernel in a stream; `name` is for errors.
template <class... Types>
void queue(void (*kernel)(Types...), std::int64_t blocks, int threads, int shared_bytes, void* stream, const char* name,
           Types... arguments) {
  void* pointers[] = {&arguments...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), pointers, static_cast<std::size_t>(shared_bytes),
                         static_cast<cudaStream_t>(stream)),
        name);
}

}  // namespace ditattn::kernels::cuda
