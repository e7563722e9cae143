#pragma once

/// Which keys quantizing kernels look at. Included by .cu files alone.

#include "kernels/cuda/hopper_impl.hpp"
#include "kernels/cuda/mask_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

// Keys of a segment that some row of a batch entry sees; `seen`: what find_seen_keys wrote, where ranges say it.
__device__ int2 seen_keys(const AttentionProblem& p, const std::int64_t* seen, int s, int batch) {
  const KeySegment& segment = p.key_segments[s];
  std::int64_t begin = 0;
  std::int64_t end = segment.keys;
  if (segment.lengths != nullptr) {
    end = clamp(segment.lengths[batch * segment.length_stride] - segment.length_offset, 0, end);
  }
  if (p.ranges != nullptr) {
    begin = clamp(seen[2 * batch] - segment.first_key, 0, end);
    end = clamp(seen[2 * batch + 1] - segment.first_key, begin, end);
  } else if (p.causal) {
    end = clamp(p.rows + p.causal_offset - segment.first_key, 0, end);
  }
  return make_int2(static_cast<int>(begin), static_cast<int>(end));
}

// Which keys of a segment a mask over keys hides, for all rows of a batch entry.
class KeyMask {
 public:
  __device__ KeyMask(const KeySegment& segment, int batch) : stride_(segment.mask.key_stride) {
    if (segment.mask.data != nullptr) {
      data_ = static_cast<const unsigned char*>(segment.mask.data) + batch * segment.mask.strides.batch;
    }
  }
  __device__ bool exists() const { return data_ != nullptr; }
  __device__ bool hides(int key) const { return data_ != nullptr && data_[key * stride_] == 0; }

 private:
  const unsigned char* data_ = nullptr;
  std::int64_t stride_;
};

// What ranges let some row of a batch entry see, to seen[2 * batch]: a block of threads for each.
__global__ void find_seen_keys(const __grid_constant__ AttentionProblem p, std::int64_t* seen) {
  hopper::wait_for_launch_before();
  hopper::start_next_launch();
  __shared__ unsigned long long ends[2];
  if (threadIdx.x == 0) ends[0] = ~0ULL, ends[1] = 0;
  __syncthreads();
  for (std::int64_t row = threadIdx.x; row < p.rows; row += blockDim.x) {
    const std::int64_t* range = p.ranges + blockIdx.x * p.range_batch_stride + 2 * row;
    if (range[0] >= range[1]) continue;
    atomicMin(&ends[0], static_cast<unsigned long long>(max(range[0], std::int64_t{0})));
    atomicMax(&ends[1], static_cast<unsigned long long>(max(range[1], std::int64_t{0})));
  }
  __syncthreads();
  if (threadIdx.x < 2)
    seen[2 * blockIdx.x + threadIdx.x] = static_cast<std::int64_t>(min(ends[threadIdx.x], 1ULL << 62));
}

}  // namespace
}  // namespace ditattn::kernels::cuda
