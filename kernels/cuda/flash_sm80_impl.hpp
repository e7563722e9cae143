#pragma once

/// Exact attention with mma.sync, for GPUs from compute capability 8.0 on. Background: FlashAttention-2 (arXiv
/// 2307.08691). Approach: a block of four warps, 32 rows each where registers allow it, as otherwise reading K and V
/// from shared memory takes as long as the products; K and V of a block of keys are copied to shared memory
/// asynchronously, V under the first product and K under the second. Included by .cu files alone.

#include "kernels/cuda/flash_rows_impl.hpp"
#include "kernels/cuda/mma_impl.hpp"

namespace ditattn::kernels::cuda {

constexpr int kFlashSm80Threads = 128;

template <class Element, int kHeadSize, int kBlockKeys>
struct FlashSm80Config {
  using T = Element;
  static constexpr int kHead = kHeadSize;  // a multiple of 16; channels past the tensor's are zeros
  static constexpr int kKeys = kBlockKeys;
  static constexpr int kHalves = kHead <= 128 ? 2 : 1;  // of a warp's rows: 16 each
  static constexpr int kWarpRows = 16 * kHalves;
  static constexpr int kThreads = kFlashSm80Threads;
  static constexpr int kRows = kThreads / 32 * kWarpRows;
  static constexpr int kPitch = kHead + 8;  // elements: eight rows begin in different banks
  static constexpr int kSharedBytes = (kRows + 2 * kKeys) * kPitch * 2;
  static_assert(kHead % 16 == 0 && kKeys % 16 == 0);
};

struct FlashSm80Arguments {
  AttentionProblem problem;
  TileOrder order;
  bool hides;  ///< some row does not see some key
};

// Tokens [first, first + kTokens) of a head; zeros past `tokens` and the head size.
template <class Config, int kTokens>
__device__ __forceinline__ void copy_tokens(typename Config::T* to, const typename Config::T* from, std::int64_t stride,
                                            int first, int tokens, int head_size) {
  constexpr int kChunks = Config::kHead / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTokens * kChunks; i += Config::kThreads) {
    const int token = i / kChunks;
    const int channel = i % kChunks * 8;
    const bool exists = first + token < tokens && channel < head_size;
    copy_async(shared_address(to + token * Config::kPitch + channel),
               exists ? from + (first + token) * stride + channel : from, exists ? 16 : 0);
  }
}

// logits += Q · Kᵀ for a warp's rows.
template <class Config>
__device__ __forceinline__ void multiply_keys_sm80(const typename Config::T* query, const typename Config::T* key,
                                                   float (&logits)[Config::kHalves][Config::kKeys / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  multiply_halves<typename Config::T, Config::kHead / 16, Config::kKeys>(
      logits,
      [&](int step, int half, std::uint32_t(&r)[4]) {
        load_matrices<false>(
            shared_address(query + (16 * half + lane % 16) * Config::kPitch + 16 * step + lane / 16 * 8), r);
      },
      [&](int step, int n, std::uint32_t(&r)[4]) {
        load_matrices<false>(
            shared_address(key + (n + lane / 16 * 8 + lane % 8) * Config::kPitch + 16 * step + lane / 8 % 2 * 8), r);
      });
}

// out += P · V.
template <class Config>
__device__ __forceinline__ void multiply_values_sm80(const float (&probabilities)[Config::kHalves][Config::kKeys / 2],
                                                     const typename Config::T* value,
                                                     float (&out)[Config::kHalves][Config::kHead / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  multiply_halves<typename Config::T, Config::kKeys / 16, Config::kHead>(
      out,
      [&](int step, int half, std::uint32_t(&r)[4]) {
        pack_keys<typename Config::T>(probabilities[half], 16 * step, r);
      },
      [&](int step, int n, std::uint32_t(&r)[4]) {
        load_matrices<true>(shared_address(value + (16 * step + lane % 16) * Config::kPitch + n + lane / 16 * 8), r);
      });
}

/// `kMasked`: some key segment has a mask.
template <class Config, bool kMasked>
__global__ void __launch_bounds__(Config::kThreads) flash_sm80(const __grid_constant__ FlashSm80Arguments arguments) {
  using T = typename Config::T;
  constexpr int kHalves = Config::kHalves;
  extern __shared__ __align__(128) unsigned char memory[];
  T* query = reinterpret_cast<T*>(memory);
  T* key = query + Config::kRows * Config::kPitch;
  T* value = key + Config::kKeys * Config::kPitch;
  const AttentionProblem& p = arguments.problem;
  const auto head_size = static_cast<int>(p.head_size);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * Config::kWarpRows;
  const float scale[2] = {p.scale * kLog2E, p.scale * kLog2E};
  const Tile tile = tile_at<Config::kRows>(p, arguments.order, blockIdx.x);
  const KeyBlocks<Config::kKeys> blocks(p, tile);
  if (blocks.total() == 0) {
    for (int h = 0; h < kHalves; ++h) store_nothing<T>(p, tile, warp_row + 16 * h);
    return;
  }

  const auto copy_block = [&](T* to, int i, const void* KeySegment::*data, const Strides KeySegment::*strides) {
    const KeySegment& segment = p.key_segments[blocks.segment_of(i)];
    const Strides& its = segment.*strides;
    copy_tokens<Config, Config::kKeys>(
        to, static_cast<const T*>(segment.*data) + tile.batch * its.batch + tile.kv_head * its.head, its.token,
        blocks.key_of(i), static_cast<int>(segment.keys), head_size);
  };
  const QuerySegment& rows = p.queries[tile.segment];
  copy_tokens<Config, Config::kRows>(
      query, static_cast<const T*>(rows.data) + tile.batch * rows.strides.batch + tile.head * rows.strides.head,
      rows.strides.token, tile.row, tile.row + tile.rows, head_size);
  copy_block(key, 0, &KeySegment::key, &KeySegment::key_strides);

  Softmax softmax[kHalves];
  float out[kHalves][Config::kHead / 2];
#pragma unroll
  for (int j = 0; j < kHalves * Config::kHead / 2; ++j) out[j / (Config::kHead / 2)][j % (Config::kHead / 2)] = 0;
  for (int i = 0; i < blocks.total(); ++i) {
    await_copies();  // K has come, and nobody reads V any more
    copy_block(value, i, &KeySegment::value, &KeySegment::value_strides);
    float logits[kHalves][Config::kKeys / 2];
    const KeySegment& segment = p.key_segments[blocks.segment_of(i)];
    SeenBits<Config::kKeys> seen[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (float& logit : logits[h]) logit = 0;
      seen[h].see_all();
      if constexpr (kMasked) apply_mask(p, segment, tile, warp_row + 16 * h, blocks.key_of(i), logits[h], seen[h]);
    }
    multiply_keys_sm80<Config>(query + warp_row * Config::kPitch, key, logits);
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if (blocks.hides(i)) {
        RowLimits limits;
        limits.find(p, segment, tile, warp_row + 16 * h);
        seen[h].limit(limits, blocks.key_of(i));
        seen[h].hide(logits[h]);
      }
      float total[2];
      float rescale[2];
      softmax[h].find_reference(logits[h], scale, rescale);
      softmax[h].exponentiate(logits[h], scale);
      Softmax::add(logits[h], total);
#pragma unroll
      for (int k = 0; k < 2; ++k) softmax[h].sum[k] = fmaf(softmax[h].sum[k], rescale[k], total[k]);
      if (__any_sync(kWarp, rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
        for (int j = 0; j < Config::kHead / 2; ++j) out[h][j] *= rescale[j / 2 % 2];
      }
    }
    await_copies();  // V has come, and nobody reads K any more
    if (i + 1 < blocks.total()) copy_block(key, i + 1, &KeySegment::key, &KeySegment::key_strides);
    multiply_values_sm80<Config>(logits, value, out);
  }
  __syncthreads();  // nobody reads Q, K and V any more
  constexpr int kScratch = (Config::kHead + 63) / 64 * 2048;
  static_assert(4 * kScratch <= Config::kSharedBytes);
  const unsigned scratch = shared_address(memory) + threadIdx.x / 32 * kScratch;
  bool broken = false;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    softmax[h].finish();
    const float factor[2] = {factor_of(softmax[h], 0), factor_of(softmax[h], 1)};
    broken = are_broken(factor, arguments.hides, out[h]) || broken;
    __syncwarp();  // the half before is read
    gather_rows<T>(scratch, factor, out[h]);
    store_gathered<T, Config::kHead / 8>(p, tile, warp_row + 16 * h, scratch);
    store_lse(p, tile, warp_row + 16 * h, softmax[h]);
  }
  if (!broken) return;
  __syncwarp();
#pragma unroll 1
  for (int h = 0; h < kHalves; ++h) mend_rows<T, Config::kHead>(p, tile, warp_row + 16 * h);
}

}  // namespace ditattn::kernels::cuda
