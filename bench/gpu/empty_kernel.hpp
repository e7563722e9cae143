#pragma once

#include <cuda_runtime.h>

/// Launches a kernel that does nothing: what no call can be faster than.
void launch_empty_kernel(cudaStream_t stream);
