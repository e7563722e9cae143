#include "kernels/cuda/fp8_tensors.hpp"

#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/cuda/launch_impl.hpp"
#include "kernels/cuda/mask_impl.hpp"

namespace ditattn::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kPiece = 8;  // elements that are read at once
constexpr std::int64_t kMostBlocks = 1024;
constexpr float kLargest = 448;  // of e4m3

struct Fp8Tensor {
  const void* from;
  std::uint8_t* to;
  Strides strides;
  std::int64_t tokens, heads;
};
struct Fp8Tensors {
  Fp8Tensor of[3];
};

template <class T>
struct alignas(16) Piece {
  T of[kPiece];
};

// Each piece of tensor blockIdx.y, and where it is among all of them, to the threads of a row of blocks.
template <class T, class Body>
__device__ void for_my_pieces(const Fp8Tensor& tensor, std::int64_t batches, std::int64_t head_size, const Body& body) {
  const std::int64_t pieces = head_size / kPiece;
  const std::int64_t all = batches * tensor.tokens * tensor.heads * pieces;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += step) {
    const std::int64_t row = i / pieces;
    const std::int64_t token = row / tensor.heads % tensor.tokens;
    const std::int64_t place = row / tensor.heads / tensor.tokens * tensor.strides.batch + token * tensor.strides.token +
                               row % tensor.heads * tensor.strides.head + i % pieces * kPiece;
    body(i, *reinterpret_cast<const Piece<T>*>(static_cast<const T*>(tensor.from) + place));
  }
}

// Bits of floats from 0 on are in the floats' order.
template <class T>
__global__ void largest_kernel(const __grid_constant__ Fp8Tensors tensors, std::int64_t batches, std::int64_t head_size,
                               Fp8Scales* scales) {
  float mine = 0;
  for_my_pieces<T>(tensors.of[blockIdx.y], batches, head_size, [&](std::int64_t, const Piece<T>& piece) {
    for (const T element : piece.of) {
      const float x = fabsf(widen(element));
      if (x < INFINITY) mine = fmaxf(mine, x);
    }
  });
  for (int distance = 16; distance > 0; distance /= 2) {
    mine = fmaxf(mine, __shfl_xor_sync(0xFFFFFFFF, mine, distance));
  }
  if (threadIdx.x % 32 == 0 && mine > 0) atomicMax(&scales->largest[blockIdx.y], __float_as_uint(mine));
}

template <class T>
__global__ void quantize_kernel(const __grid_constant__ Fp8Tensors tensors, std::int64_t batches,
                                std::int64_t head_size, Fp8Scales* scales) {
  const float most = __uint_as_float(scales->largest[blockIdx.y]);
  const float scale = most > 0 ? kLargest / most : 1;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    (&scales->query_descale)[blockIdx.y] = most > 0 ? most / kLargest : 1;
    if (blockIdx.y == 0) {
      scales->probability_scale = kFp8ProbabilityScale;
      scales->probability_descale = 1 / kFp8ProbabilityScale;
      scales->out_scale = 1;
    }
  }
  const Fp8Tensor& tensor = tensors.of[blockIdx.y];
  for_my_pieces<T>(tensor, batches, head_size, [&](std::int64_t i, const Piece<T>& piece) {
    uint2 packed;
    auto* bytes = reinterpret_cast<__nv_fp8_storage_t*>(&packed);
    for (int k = 0; k < kPiece; ++k) {
      bytes[k] = __nv_cvt_float_to_fp8(widen(piece.of[k]) * scale, __NV_SATFINITE, __NV_E4M3);
    }
    reinterpret_cast<uint2*>(tensor.to)[i] = packed;
  });
}

template <class T>
void launch_both(const AttentionProblem& p, const Fp8Tensors& tensors, Fp8Scales* scales, cudaStream_t stream) {
  check(cudaMemsetAsync(scales->largest, 0, sizeof(scales->largest), stream), "cudaMemsetAsync");
  std::int64_t rows = 0;
  for (const Fp8Tensor& tensor : tensors.of) rows = std::max(rows, p.batch * tensor.tokens * tensor.heads);
  const std::int64_t blocks = (rows * (p.head_size / kPiece) + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(std::clamp<std::int64_t>(blocks, 1, kMostBlocks)), 3);
  largest_kernel<T><<<grid, kThreads, 0, stream>>>(tensors, p.batch, p.head_size, scales);
  check(cudaGetLastError(), "write_fp8");
  quantize_kernel<T><<<grid, kThreads, 0, stream>>>(tensors, p.batch, p.head_size, scales);
  check(cudaGetLastError(), "write_fp8");
}

}  // namespace

void write_fp8(const AttentionProblem& p, void* query, void* key, void* value, Fp8Scales* scales,
               const Launch& launch) {
  const OnDevice on_device(launch.device);
  auto* const stream = static_cast<cudaStream_t>(launch.stream);
  const KeySegment& keys = p.key_segments[0];
  const auto to = [](void* memory) { return static_cast<std::uint8_t*>(memory); };
  const Fp8Tensors tensors{{{p.queries[0].data, to(query), p.queries[0].strides, p.rows, p.heads},
                            {keys.key, to(key), keys.key_strides, keys.keys, p.kv_heads},
                            {keys.value, to(value), keys.value_strides, keys.keys, p.kv_heads}}};
  if (p.type == ElementType::bfloat16) {
    launch_both<__nv_bfloat16>(p, tensors, scales, stream);
  } else {
    launch_both<__half>(p, tensors, scales, stream);
  }
}

}  // namespace ditattn::kernels::cuda
