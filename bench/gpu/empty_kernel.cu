#include "bench/gpu/empty_kernel.hpp"

namespace {

// As many bytes as FLASH_ATTN's kernel on Hopper takes.
struct Parameters {
  char bytes[1280];
};

__global__ void empty_kernel(const __grid_constant__ Parameters) {}

}  // namespace

void launch_empty_kernel(cudaStream_t stream) { empty_kernel<<<1, 32, 0, stream>>>({}); }
