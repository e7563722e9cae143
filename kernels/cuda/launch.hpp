#pragma once

namespace ditattn::kernels::cuda {

/// Where a kernel runs.
struct Launch {
  int device = 0;
  void* stream = nullptr;  ///< a cudaStream_t; null: the default stream
};

}  // namespace ditattn::kernels::cuda
