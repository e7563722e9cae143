#pragma once

/// What the kernels of quantized attention have in common. Included by .cu files alone.

#include "kernels/cuda/flash_rows_impl.hpp"
#include "kernels/cuda/sage_images.hpp"

namespace ditattn::kernels::cuda {

/// e4m3 has 448 at most. Sums of whole products start at the bits of 1.5 · 2²³: below 2²², they are then, as floats,
/// that much above their value, without a conversion, which took a fifth of the kernel's time.
struct ByteLimits {
  static constexpr float kSlack = 8;
  static constexpr float kTop = 4;
  static constexpr float kLargest = 448;
  static constexpr float kOrigin = 12582912;
};

/// Sums of products of e4m3 are floats.
struct Fp8Limits : ByteLimits {
  static constexpr float kOrigin = 0;
};

/// Where a block of a segment is in the images.
__device__ __forceinline__ std::size_t block_of(const AttentionProblem& p, const SageImages& images, const Tile& tile,
                                                int segment, int block) {
  const auto kv_head = static_cast<std::size_t>(tile.batch) * p.kv_heads + tile.kv_head;
  return kv_head * (images.key_blocks[0] + images.key_blocks[1]) + (segment == 1 ? images.key_blocks[0] : 0) + block;
}

/// Where a tile of 64 rows of Q is: the one that `tile` begins with.
__device__ __forceinline__ std::size_t query_tile_of(const AttentionProblem& p, const SageImages& images,
                                                     const Tile& tile) {
  const auto head = static_cast<std::size_t>(tile.batch) * p.heads + tile.head;
  return head * (images.query_tiles[0] + images.query_tiles[1]) + (tile.segment == 1 ? images.query_tiles[0] : 0) +
         tile.row / kSageQueryRows;
}

/// Four numbers to e4m3, the first in the lowest byte.
__device__ __forceinline__ std::uint32_t to_e4m3(float a, float b, float c, float d) {
  std::uint32_t x;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, "
      "%3;\nmov.b32 %0, {low, high};\n}\n"
      : "=r"(x)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return x;
}

/// A thread's probabilities of two rows, as the first operand of products of 32 keys: a row has the numbers of columns
/// 8 · j + 2 · (lane % 4) + c, which sage_key_at puts here.
template <int kKeys>
__device__ __forceinline__ void round_to_e4m3(const float (&probabilities)[kKeys / 2],
                                              std::uint32_t (&rounded)[kKeys / 8]) {
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
    const int at = j / 4 * 16 + j % 4 / 2 * 8 + j % 2 * 2;  // row, and which half of the keys
    rounded[j] = to_e4m3(probabilities[at], probabilities[at + 1], probabilities[at + 4], probabilities[at + 5]);
  }
}

/// A scale that no product of hidden logits, −∞, makes NaN; NaN stays.
__device__ __forceinline__ float above_zero(float x) {
  asm("max.NaN.f32 %0, %0, 0f03AA2425;" : "+f"(x));  // 1e-36
  return x;
}

/// Hides what a warp's 16 rows do not see of the block of keys from `first_key` of a segment on.
template <int kKeys>
__device__ __forceinline__ void hide_keys(const AttentionProblem& p, const SageImages& images, const Tile& tile,
                                          int warp_row, int segment, int first_key, float (&logits)[kKeys / 2]) {
  RowLimits limits;
  SeenBits<kKeys> seen;
  limits.find(p, p.key_segments[segment], tile, warp_row);
  seen.see_all();
  if (p.key_segments[segment].mask.data != nullptr) {
    const std::uint32_t* bits = images.key_bits + block_of(p, images, tile, segment, first_key / kKeys) * (kKeys / 32);
#pragma unroll
    for (int w = 0; w < kKeys / 32; ++w) seen.words[0][w] = seen.words[1][w] = bits[w] >> seen.shift();
  }
  seen.limit(limits, first_key);
  seen.hide(logits);
}

/// What sums of P · V are the output of: divided by the rows' sums, with V's scales and means.
template <int kHead, class Limits>
__device__ __forceinline__ void finish_rows(const AttentionProblem& p, const SageImages& images, const Tile& tile,
                                            const BasicSoftmax<Limits>& softmax, const float (&factor)[2],
                                            float (&out)[kHead / 2]) {
  constexpr int kChannels = sage_channels(kHead);
  const std::size_t channels =
      (static_cast<std::size_t>(tile.batch) * p.kv_heads + tile.kv_head) * kChannels + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kHead / 8; ++j) {
    const float2 scale_of = *reinterpret_cast<const float2*>(images.value_scale + channels + 8 * j);
    const float2 mean_of = *reinterpret_cast<const float2*>(images.value_mean + channels + 8 * j);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool sees = softmax.sum[i] != 0;
      out[4 * j + 2 * i] = fmaf(out[4 * j + 2 * i] * factor[i], scale_of.x, sees ? mean_of.x : 0);
      out[4 * j + 2 * i + 1] = fmaf(out[4 * j + 2 * i + 1] * factor[i], scale_of.y, sees ? mean_of.y : 0);
    }
  }
}

/// A warp's rows, gathered in shared memory, element by element.
template <class T>
__device__ void store_elements(const AttentionProblem& p, const Tile& tile, int warp_row, unsigned scratch) {
  __syncwarp();
  const int rows = min(16, tile.rows - warp_row);
  for (int row = 0; row < rows; ++row) {
    T* target = out_row<T>(p, tile, warp_row + row);
    for (int c = static_cast<int>(threadIdx.x % 32); c < p.head_size; c += 32) {
      std::uint16_t bits;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(scratch + piece_of(row, c / 8) + c % 8 * 2) : "memory");
      target[c] = reinterpret_cast<const T&>(bits);
    }
  }
  __syncwarp();
}

}  // namespace ditattn::kernels::cuda
