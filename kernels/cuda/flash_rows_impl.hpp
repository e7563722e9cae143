#pragma once

/// How the kernels on matrix units write rows, and compute those again whose result is not finite. Included by .cu
/// files alone.

#include "kernels/cuda/flash_softmax_impl.hpp"

namespace ditattn::kernels::cuda {

__device__ __forceinline__ std::uint32_t pack(float a, float b, __half) {
  const __half2 x = __floats2half2_rn(a, b);
  return reinterpret_cast<const std::uint32_t&>(x);
}
__device__ __forceinline__ std::uint32_t pack(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const std::uint32_t&>(x);
}

/// Four words of each of four neighbouring threads, transposed.
__device__ __forceinline__ void transpose_quad(std::uint32_t* w) {
  const bool odd = (threadIdx.x & 1) != 0;
  const bool high = (threadIdx.x & 2) != 0;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const std::uint32_t got = __shfl_xor_sync(kWarp, odd ? w[k] : w[k + 1], 1);
    w[k] = odd ? got : w[k];
    w[k + 1] = odd ? w[k + 1] : got;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const std::uint32_t got = __shfl_xor_sync(kWarp, high ? w[k] : w[k + 2], 2);
    w[k] = high ? got : w[k];
    w[k + 2] = high ? w[k + 2] : got;
  }
}

/// Whether a row of the warp has an output that is not finite. Where nothing is hidden, only too large sums make such
/// ones that should not be.
template <int kCount>
__device__ __forceinline__ bool are_broken(const Softmax& softmax, bool hides, const float (&out)[kCount]) {
  float x[4] = {softmax.sum[0] * 0, softmax.sum[1] * 0, 0, 0};
  if (hides) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k % 4] = fmaf(out[k], 0, x[k % 4]);
  }
  return __any_sync(kWarp, (x[0] + x[1]) + (x[2] + x[3]) != 0);  // NaN
}

template <class T>
__device__ T* out_row(const AttentionProblem& p, const Tile& tile, int row) {
  return static_cast<T*>(p.out) + tile.batch * p.out_strides.batch + (tile.first_row + row) * p.out_strides.token +
         tile.head * p.out_strides.head;
}

__device__ inline float* lse_of(const AttentionProblem& p, const Tile& tile, int row) {
  return p.lse + tile.batch * p.lse_strides.batch + (tile.first_row + row) * p.lse_strides.token +
         tile.head * p.lse_strides.head;
}

/// One row by one warp, key by key, without those that are hidden, for rows of which the matrix units' result is not
/// finite: what stands in hidden positions may be Inf or NaN, which 0 times is NaN, and logits may have risen by more
/// than float32 holds. A result that has to be Inf or NaN is found again, slowly.
template <class T, int kHead>
__device__ void compute_row(const AttentionProblem& p, const Tile& tile, int row) {
  constexpr int kSlices = (kHead + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const QuerySegment& segment = p.queries[tile.segment];
  const T* query = static_cast<const T*>(segment.data) + tile.batch * segment.strides.batch +
                   (tile.row + row) * segment.strides.token + tile.head * segment.strides.head;
  float q[kSlices];
  float out[kSlices];
#pragma unroll
  for (int j = 0; j < kSlices; ++j) {
    q[j] = 32 * j + lane < p.head_size ? widen(query[32 * j + lane]) : 0;
    out[j] = 0;
  }
  float top = -INFINITY;
  float sum = 0;
  const auto visit = [&](const KeySegment& keys, int key) {
    const T* k = static_cast<const T*>(keys.key) + tile.batch * keys.key_strides.batch +
                 tile.kv_head * keys.key_strides.head + key * keys.key_strides.token;
    const T* v = static_cast<const T*>(keys.value) + tile.batch * keys.value_strides.batch +
                 tile.kv_head * keys.value_strides.head + key * keys.value_strides.token;
    const float bias = __shfl_sync(kWarp, mask_of(keys, tile, tile.first_row + row, key), 0);
    if (bias == -INFINITY) return;
    float logit = 0;
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
      if (32 * j + lane < p.head_size) logit = fmaf(q[j], widen(k[32 * j + lane]), logit);
    }
    for (int distance = 16; distance > 0; distance /= 2) logit += __shfl_xor_sync(kWarp, logit, distance);
    logit = logit * p.scale + bias;
    if (logit == -INFINITY && top == -INFINITY) return;
    const float higher = fmaxf(top, logit);  // not NaN; what follows is, then
    const float rescale = exp2f((top - higher) * kLog2E);
    const float probability = exp2f((logit - higher) * kLog2E);
    top = higher;
    sum = fmaf(sum, rescale, probability);
#pragma unroll
    for (int j = 0; j < kSlices; ++j) {
      if (32 * j + lane < p.head_size) out[j] = fmaf(out[j], rescale, probability * widen(v[32 * j + lane]));
    }
  };
  for (int s = 0; s < p.num_key_segments; ++s) {
    const int2 keys = keys_of_row(p, p.key_segments[s], tile.batch, tile.first_row + row);
    const int end = __shfl_sync(kWarp, keys.y, 0);
    for (int key = __shfl_sync(kWarp, keys.x, 0); key < end; ++key) visit(p.key_segments[s], key);
  }
  T* target = out_row<T>(p, tile, row);
#pragma unroll
  for (int j = 0; j < kSlices; ++j) {
    if (32 * j + lane < p.head_size) narrow(sum == 0 ? 0 : out[j] / sum, target[32 * j + lane]);
  }
  if (p.lse != nullptr && lane == 0) *lse_of(p, tile, row) = sum == 0 ? -INFINITY : top + logf(sum);
}

/// Computes those of a warp's 16 rows again of which the output that was written is not finite.
template <class T, int kHead>
__device__ void mend_rows(const AttentionProblem& p, const Tile& tile, int warp_row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int rows = min(warp_row + 16, tile.rows);
  for (int row = warp_row; row < rows; ++row) {
    bool broken = false;
    for (int c = lane; c < p.head_size; c += 32) broken = broken || !isfinite(widen(out_row<T>(p, tile, row)[c]));
    if (__any_sync(kWarp, broken)) compute_row<T, kHead>(p, tile, row);
  }
}

/// Writes zeros and −∞ for a warp's rows, which see nothing.
template <class T>
__device__ void store_nothing(const AttentionProblem& p, const Tile& tile, int warp_row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int rows = min(warp_row + 16, tile.rows);
  for (int row = warp_row; row < rows; ++row) {
    for (int c = lane; c < p.head_size; c += 32) narrow(0, out_row<T>(p, tile, row)[c]);
    if (p.lse != nullptr && lane == 0) *lse_of(p, tile, row) = -INFINITY;
  }
}

/// Writes a thread's part of two rows of the output, 16 bytes at a time, and their log-sum-exp.
template <class T, int kCount>
__device__ __forceinline__ void store_rows(const AttentionProblem& p, const Tile& tile, int warp_row,
                                           const Softmax& softmax, const float (&out)[kCount]) {
  constexpr int kSets = kCount / 16;  // of 32 channels
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + lane / 4 + 8 * i;
    const float factor = softmax.sum[i] == 0 ? 0 : __fdividef(1, softmax.sum[i]);
    std::uint32_t w[kCount / 4];
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) w[j] = pack(out[4 * j + 2 * i] * factor, out[4 * j + 2 * i + 1] * factor, T{});
#pragma unroll
    for (int set = 0; set < kSets; ++set) transpose_quad(w + 4 * set);
    if (row >= tile.rows) continue;
    T* target = out_row<T>(p, tile, row) + 8 * (lane % 4);
    const int channels = static_cast<int>(p.head_size) - 8 * (lane % 4);
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const std::uint32_t* x = w + 4 * set;
      if (32 * set < channels) *reinterpret_cast<uint4*>(target + 32 * set) = make_uint4(x[0], x[1], x[2], x[3]);
    }
#pragma unroll
    for (int j = 4 * kSets; j < kCount / 4; ++j) {
      const int channel = 8 * j + 2 * (lane % 4);
      if (channel < p.head_size) *reinterpret_cast<std::uint32_t*>(out_row<T>(p, tile, row) + channel) = w[j];
    }
    if (p.lse != nullptr && lane % 4 == 0) {
      *lse_of(p, tile, row) = softmax.sum[i] == 0 ? -INFINITY : (softmax.reference[i] + __log2f(softmax.sum[i])) * kLn2;
    }
  }
}

}  // namespace ditattn::kernels::cuda
