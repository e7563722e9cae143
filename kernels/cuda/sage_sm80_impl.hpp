#pragma once

/// Quantized attention with mma.sync, for GPUs from compute capability 8.0 on, and for V in float16. Background:
/// SageAttention 2 (arXiv 2411.10958). Approach: flash_sm80's, over sage_sm90's images, which are read as they lie; a
/// warp has 32 rows where registers allow it, as otherwise reading K and V from shared memory takes as long as the
/// products. Tensor cores add up e4m3 products to about 14 bits, so each block's go to float32 sums. Included by .cu
/// files alone.

#include <type_traits>

#include "kernels/cuda/mma_impl.hpp"
#include "kernels/cuda/sage_sm80.hpp"
#include "kernels/cuda/sage_tile_impl.hpp"

namespace ditattn::kernels::cuda {

constexpr int kSageSm80Threads = 128;

/// Element: of the output; Number: of Q and K, std::int8_t or __nv_fp8_e4m3; kIsWide: V and P in float16, else e4m3.
template <class Element, class Number, bool kIsWide, int kHeadSize>
struct SageSm80Config {
  using T = Element;
  using N = Number;
  static constexpr bool kIsFp8 = std::is_same_v<Number, __nv_fp8_e4m3>;
  static constexpr bool kHasWideValues = kIsWide;
  using Product = std::conditional_t<kIsFp8, float, int>;
  using Limits = std::conditional_t<kIsFp8, Fp8Limits, ByteLimits>;
  static constexpr int kHead = kHeadSize;
  static constexpr int kChannels = sage_channels(kHead);
  static constexpr int kRowBytes = sage_row_bytes(kChannels);
  static constexpr int kKeys = kSageSm80Keys;
  static constexpr int kHalves = kHead <= 128 ? 2 : 1;  // of a warp's rows: 16 each
  static constexpr int kWarpRows = 16 * kHalves;
  static constexpr int kRows = kSageSm80Threads / 32 * kWarpRows;
  static constexpr int kQueryBytes = kRows * kChannels;
  static constexpr int kKeyBytes = kKeys * kChannels;
  static constexpr int kValueBytes = kKeys * kHead * (kIsWide ? 2 : 1);
  static constexpr int kScratchBytes = (kHead + 63) / 64 * 2048;  // of a warp: 16 rows of the output
  static constexpr int kOperandBytes = kQueryBytes + kKeyBytes + kValueBytes + 4 * kSageKeyGroups;
  static constexpr int kOutputBytes = kSageSm80Threads / 32 * kScratchBytes;
  static constexpr int kSharedBytes = kOperandBytes > kOutputBytes ? kOperandBytes : kOutputBytes;
  static_assert(kHead % 16 == 0 && kRows % kSageQueryRows == 0);
};

struct SageSm80Arguments {
  AttentionProblem problem;
  SageImages images;
  TileOrder order;
  bool aligned_output;  ///< is written in pieces of 16 bytes; else element by element
  bool has_offsets;     ///< problem.lse has what smoothing K took off
};

// Part of an image.
template <int kBytes>
__device__ __forceinline__ void copy_image(unsigned to, const void* from) {
#pragma unroll
  for (int i = 0; i < kBytes; i += 16 * kSageSm80Threads) {
    const int at = i + 16 * static_cast<int>(threadIdx.x);
    if (kBytes % (16 * kSageSm80Threads) == 0 || at < kBytes) {
      copy_async(to + at, static_cast<const char*>(from) + at, 16);
    }
  }
}

// products += Q · Kᵀ for a warp's rows, of which the image's tiles of 64 lie one after the other.
template <class Config>
__device__ __forceinline__ void multiply_keys_sm80(
    typename Config::Product (&products)[Config::kHalves][Config::kKeys / 2], unsigned query, unsigned key,
    int warp_row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  multiply_halves<typename Config::N, (Config::kHead + 31) / 32, Config::kKeys>(
      products,
      [&](int step, int half, std::uint32_t(&r)[4]) {
        const int row = warp_row + 16 * half;
        load_matrices<false>(query + row / kSageQueryRows * (kSageQueryRows * Config::kChannels) +
                                 sage_place(kSageQueryRows, Config::kRowBytes, row % kSageQueryRows + lane % 16,
                                            32 * step + lane / 16 * 16),
                             r);
      },
      [&](int step, int n, std::uint32_t(&r)[4]) {
        load_matrices<false>(key + sage_place(Config::kKeys, Config::kRowBytes, n + lane / 16 * 8 + lane % 8,
                                              32 * step + lane / 8 % 2 * 16),
                             r);
      });
}

// out = out · rescale + P · V, in float16.
template <class Config>
__device__ __forceinline__ void multiply_wide_values(const float (&probabilities)[Config::kHalves][Config::kKeys / 2],
                                                     const float (&rescale)[Config::kHalves][2], unsigned value,
                                                     float (&out)[Config::kHalves][Config::kHead / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int h = 0; h < Config::kHalves; ++h) {
    if (!__any_sync(kWarp, rescale[h][0] != 1 || rescale[h][1] != 1)) continue;
#pragma unroll
    for (int j = 0; j < Config::kHead / 2; ++j) out[h][j] *= rescale[h][j / 2 % 2];
  }
  multiply_halves<__half, Config::kKeys / 16, Config::kHead>(
      out, [&](int step, int half, std::uint32_t(&r)[4]) { pack_keys<__half>(probabilities[half], 16 * step, r); },
      [&](int step, int n, std::uint32_t(&r)[4]) {
        load_matrices<true>(
            value + sage_place(Config::kKeys, kSageWidePanelBytes, 16 * step + lane % 16, 2 * n + lane / 16 * 16), r);
      });
}

// out = out · rescale + P · V, in e4m3.
template <class Config>
__device__ __forceinline__ void multiply_fp8_values(const float (&probabilities)[Config::kHalves][Config::kKeys / 2],
                                                    const float (&rescale)[Config::kHalves][2], unsigned value,
                                                    float (&out)[Config::kHalves][Config::kHead / 2]) {
  constexpr int kPanels = Config::kKeys / kSagePanelKeys;
  const int lane = static_cast<int>(threadIdx.x % 32);
  std::uint32_t a[Config::kHalves][Config::kKeys / 8];
#pragma unroll
  for (int h = 0; h < Config::kHalves; ++h) round_to_e4m3<Config::kKeys>(probabilities[h], a[h]);
#pragma unroll
  for (int n = 0; n < Config::kHead; n += 16) {
    std::uint32_t b[kPanels][4];
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      load_matrices<false>(value + sage_place(Config::kHead, kSagePanelKeys, n + lane / 16 * 8 + lane % 8,
                                              panel * kSagePanelKeys + lane / 8 % 2 * 16),
                           b[panel]);
    }
#pragma unroll
    for (int h = 0; h < Config::kHalves; ++h) {
      float sums[8] = {};
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        multiply_step(sums, a[h] + 4 * panel, b[panel], __nv_fp8_e4m3{});
        multiply_step(sums + 4, a[h] + 4 * panel, b[panel] + 2, __nv_fp8_e4m3{});
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) out[h][n / 2 + j] = fmaf(out[h][n / 2 + j], rescale[h][j / 2 % 2], sums[j]);
    }
  }
}

template <class Config>
__device__ __forceinline__ void attend_sm80(const SageSm80Arguments& a, unsigned char* memory) {
  using T = typename Config::T;
  using Softmax = BasicSoftmax<typename Config::Limits>;
  constexpr int kHalves = Config::kHalves;
  const AttentionProblem& p = a.problem;
  const SageImages& images = a.images;
  const unsigned query = shared_address(memory);
  const unsigned key = query + Config::kQueryBytes;
  const unsigned value = key + Config::kKeyBytes;
  const auto* key_scale = reinterpret_cast<const float*>(memory + Config::kOperandBytes) - kSageKeyGroups;
  const int warp_row = static_cast<int>(threadIdx.x / 32) * Config::kWarpRows;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Tile tile = tile_at<Config::kRows>(p, a.order, blockIdx.x);
  const KeyBlocks<Config::kKeys> blocks(p, tile);
  if (blocks.total() == 0) {
    for (int h = 0; h < kHalves; ++h) store_nothing<T>(p, tile, warp_row + 16 * h);
    return;
  }

  const auto place_of = [&](int i) {
    return block_of(p, images, tile, blocks.segment_of(i), blocks.key_of(i) / Config::kKeys);
  };
  const auto copy_key = [&](int i) {
    const std::size_t place = place_of(i);
    copy_image<Config::kKeyBytes>(key, images.key + place * Config::kKeyBytes);
    if (threadIdx.x == 0) copy_async(shared_address(key_scale), images.key_scale + place * kSageKeyGroups, 16);
  };
  const std::size_t query_tile = query_tile_of(p, images, tile);
  const int last = images.query_tiles[tile.segment] - 1 - tile.row / kSageQueryRows;
  constexpr int kTileBytes = kSageQueryRows * Config::kChannels;
#pragma unroll
  for (int t = 0; t < Config::kRows / kSageQueryRows; ++t) {
    // Past the last there is none: what is read instead is not used.
    copy_image<kTileBytes>(query + t * kTileBytes, images.query + (query_tile + min(t, last)) * kTileBytes);
  }
  copy_key(0);
  float query_scale[kHalves][2];
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + 16 * h + lane / 4 + 8 * i;
      query_scale[h][i] =
          images.query_scale[(query_tile + min(row / kSageQueryRows, last)) * kSageQueryRows + row % kSageQueryRows];
    }
  }

  Softmax softmax[kHalves];
  float out[kHalves][Config::kHead / 2];
#pragma unroll
  for (int j = 0; j < kHalves * Config::kHead / 2; ++j) out[j / (Config::kHead / 2)][j % (Config::kHead / 2)] = 0;
  for (int i = 0; i < blocks.total(); ++i) {
    await_copies();  // K has come, and nobody reads V any more
    copy_image<Config::kValueBytes>(value, images.value + place_of(i) * Config::kValueBytes);
    const float of_keys = key_scale[lane % kSageKeyGroups];
    typename Config::Product products[kHalves][Config::kKeys / 2];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (auto& product : products[h]) {
        if constexpr (Config::kIsFp8) {
          product = 0;
        } else {
          product = __float_as_int(Softmax::kOrigin);
        }
      }
    }
    multiply_keys_sm80<Config>(products, query, key, warp_row);
    float probabilities[kHalves][Config::kKeys / 2];
    float rescale[kHalves][2];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      float scale[2];
      float total[2];
      float(&logits)[Config::kKeys / 2] = probabilities[h];
#pragma unroll
      for (int k = 0; k < 2; ++k) scale[k] = above_zero(query_scale[h][k] * of_keys);
#pragma unroll
      for (int k = 0; k < Config::kKeys / 2; ++k) {
        if constexpr (Config::kIsFp8) {
          logits[k] = products[h][k];
        } else {
          logits[k] = __int_as_float(products[h][k]);
        }
      }
      if (blocks.hides(i)) {
        hide_keys<Config::kKeys>(p, images, tile, warp_row + 16 * h, blocks.segment_of(i), blocks.key_of(i), logits);
      }
      softmax[h].find_reference(logits, scale, rescale[h]);
      softmax[h].exponentiate(logits, scale);
      Softmax::add(logits, total);
#pragma unroll
      for (int k = 0; k < 2; ++k) softmax[h].sum[k] = fmaf(softmax[h].sum[k], rescale[h][k], total[k]);
    }
    await_copies();  // V has come, and nobody reads K any more
    if (i + 1 < blocks.total()) copy_key(i + 1);
    if constexpr (Config::kHasWideValues) {
      multiply_wide_values<Config>(probabilities, rescale, value, out);
    } else {
      multiply_fp8_values<Config>(probabilities, rescale, value, out);
    }
  }

  __syncthreads();  // nobody reads Q, K and V any more
  const unsigned scratch = query + threadIdx.x / 32 * Config::kScratchBytes;
  bool broken = false;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    softmax[h].finish();
    const float factor[2] = {factor_of(softmax[h], 0), factor_of(softmax[h], 1)};
    finish_rows<Config::kHead>(p, images, tile, softmax[h], factor, out[h]);
    broken = are_broken(factor, true, out[h]) || broken;
    const float one[2] = {1, 1};
    const int first_row = warp_row + 16 * h;
    __syncwarp();  // the half before is read
    gather_rows<T>(scratch, one, out[h]);
    if (a.aligned_output) {
      store_gathered<T, Config::kHead / 8>(p, tile, first_row, scratch);
    } else {
      store_elements<T>(p, tile, first_row, scratch);
    }
    store_lse(p, tile, first_row, softmax[h], a.has_offsets);
  }
  if (!broken) return;
  __syncwarp();
#pragma unroll 1
  for (int h = 0; h < kHalves; ++h) mend_rows<T, Config::kHead>(p, tile, warp_row + 16 * h);
}

/// Two blocks of threads a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(kSageSm80Threads, 2) sage_sm80(const __grid_constant__ SageSm80Arguments arguments) {
  extern __shared__ __align__(128) unsigned char memory[];
#if __CUDA_ARCH__ < 890
  if constexpr (Config::kHasWideValues && !Config::kIsFp8) attend_sm80<Config>(arguments, memory);
#else
  attend_sm80<Config>(arguments, memory);
#endif
}

}  // namespace ditattn::kernels::cuda
