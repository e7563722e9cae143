#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/engine_masks.hpp"
#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/mask_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kThreads = 128;

__device__ std::int64_t length_of(const KeySegment& segment, std::int64_t batch) {
  if (segment.lengths == nullptr) return segment.keys;
  return clamp(segment.lengths[batch * segment.length_stride] - segment.length_offset, 0, segment.keys);
}

__global__ void lengths_kernel(const __grid_constant__ AttentionProblem p, std::int32_t* query_lengths,
                               std::int32_t* key_lengths) {
  const std::int64_t batch = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (batch >= p.batch) return;
  query_lengths[batch] = static_cast<std::int32_t>(p.rows);
  key_lengths[batch] = static_cast<std::int32_t>(length_of(p.key_segments[0], batch));
}

// One block per row of the bias.
__global__ void bias_kernel(const __grid_constant__ AttentionProblem p, BiasShape shape, float* bias,
                            std::uint8_t* empty_rows) {
  const KeySegment& segment = p.key_segments[0];
  const Mask& mask = segment.mask;
  const std::int64_t line = blockIdx.x;
  const std::int64_t row = line % p.rows;
  const std::int64_t head = line / p.rows % shape.heads;
  const std::int64_t batch = line / p.rows / shape.heads;
  const std::int64_t end = p.causal ? clamp(row + p.causal_offset + 1, 0, segment.keys) : segment.keys;
  const std::int64_t first =
      batch * mask.strides.batch + (row - mask.first_row) * mask.strides.token + head * mask.strides.head;
  float* to = bias + line * p.keys;
  bool sees = false;
  for (std::int64_t key = threadIdx.x; key < p.keys; key += blockDim.x) {
    const float x = load_mask(mask, first + key * mask.key_stride);
    to[key] = x;
    sees = sees || (key < end && x != -INFINITY);
  }
  if (__syncthreads_or(sees ? 1 : 0) != 0) {
    if (threadIdx.x == 0) empty_rows[line] = 0;
    return;
  }
  if (threadIdx.x == 0) empty_rows[line] = 1;
  for (std::int64_t key = threadIdx.x; key < p.keys; key += blockDim.x) to[key] = 0;
}

// One block per row of the output.
__global__ void finish_kernel(const __grid_constant__ AttentionProblem p, BiasShape shape,
                              const std::uint8_t* empty_rows, const float* packed_lse) {
  const std::int64_t line = blockIdx.x;
  const std::int64_t row = line % p.rows;
  const std::int64_t head = line / p.rows % p.heads;
  const std::int64_t batch = line / p.rows / p.heads;
  const std::int64_t flag = ((shape.batch > 1 ? batch : 0) * shape.heads + (shape.heads > 1 ? head : 0)) * p.rows + row;
  const bool empty = length_of(p.key_segments[0], batch) == 0 || (empty_rows != nullptr && empty_rows[flag] != 0);
  if (p.lse != nullptr && threadIdx.x == 0 && (empty || packed_lse != nullptr)) {
    p.lse[batch * p.lse_strides.batch + row * p.lse_strides.token + head * p.lse_strides.head] =
        empty ? -INFINITY : packed_lse[line];
  }
  if (!empty) return;
  auto* out = static_cast<std::uint16_t*>(p.out) + batch * p.out_strides.batch + row * p.out_strides.token +
              head * p.out_strides.head;
  for (std::int64_t d = threadIdx.x; d < p.head_size; d += blockDim.x) out[d] = 0;
}

unsigned grid(std::int64_t blocks) {
  if (blocks <= 2147483647) return static_cast<unsigned>(blocks);
  throw std::runtime_error(std::to_string(blocks) + " rows are too many for one launch. Split the batch.");
}

}  // namespace

void write_lengths(const AttentionProblem& problem, std::int32_t* query_lengths, std::int32_t* key_lengths,
                   const Launch& launch) {
  const OnDevice on_device(launch.device);
  lengths_kernel<<<grid((problem.batch + kThreads - 1) / kThreads), kThreads, 0,
                   static_cast<cudaStream_t>(launch.stream)>>>(problem, query_lengths, key_lengths);
  check(cudaGetLastError(), "write_lengths");
}

BiasShape bias_shape(const AttentionProblem& problem) {
  const Mask& mask = problem.key_segments[0].mask;
  return {.batch = mask.strides.batch == 0 ? 1 : problem.batch, .heads = mask.strides.head == 0 ? 1 : problem.heads};
}

void write_bias(const AttentionProblem& problem, float* bias, std::uint8_t* empty_rows, const Launch& launch) {
  const OnDevice on_device(launch.device);
  const BiasShape shape = bias_shape(problem);
  bias_kernel<<<grid(shape.batch * shape.heads * problem.rows), kThreads, 0,
                static_cast<cudaStream_t>(launch.stream)>>>(problem, shape, bias, empty_rows);
  check(cudaGetLastError(), "write_bias");
}

void finish_rows(const AttentionProblem& problem, const std::uint8_t* empty_rows, const float* packed_lse,
                 const Launch& launch) {
  const OnDevice on_device(launch.device);
  finish_kernel<<<grid(problem.batch * problem.heads * problem.rows), kThreads, 0,
                  static_cast<cudaStream_t>(launch.stream)>>>(problem, bias_shape(problem), empty_rows, packed_lse);
  check(cudaGetLastError(), "finish_rows");
}

}  // namespace ditattn::kernels::cuda
