#pragma once

/// SAGE_ATTN_3 with mma.sync, emulated (docs/kernels/sage3.md), for GPUs from compute capability 8.0 on: flash_sm80's
/// products, of NVFP4's numbers times their groups' scales, which 16-bit floats hold exactly. Included by .cu files
/// alone.

#include "kernels/cuda/flash_sm80_impl.hpp"
#include "kernels/cuda/sage3_softmax_impl.hpp"

namespace ditattn::kernels::cuda {

template <class Element, int kHeadSize>
struct Sage3Sm80Config {
  using T = Element;
  static constexpr int kHead = kHeadSize;  // channels past the images' are zeros
  static constexpr int kKeys = kSage3Keys;
  static constexpr int kHalves = 1;  // of a warp's rows
  static constexpr int kThreads = kFlashSm80Threads;
  static constexpr int kRows = kThreads / 32 * 16;
  static constexpr int kPitch = kHead + 8;               // elements: eight rows begin in different banks
  static constexpr bool kHasValueBuffer = kHead <= 128;  // else V takes K's
  static constexpr int kSharedBytes = (kRows + (kHasValueBuffer ? 2 : 1) * kKeys) * kPitch * 2;
};

struct Sage3Sm80Arguments {
  AttentionProblem problem;
  AttentionProblem numbers;  ///< of the images
  Sage3Images images;
  TileOrder order;
  bool aligned_output;
  bool adds_lse;
};

// out += P · V, of pairs of P as `pack_numbers` gives them.
template <class Config>
__device__ __forceinline__ void multiply_packed(const std::uint32_t (&probabilities)[kSage3Logits / 2],
                                                const typename Config::T* value, float (&out)[1][Config::kHead / 2]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  multiply_halves<typename Config::T, Config::kKeys / 16, Config::kHead>(
      out,
      [&](int step, int, std::uint32_t(&r)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = probabilities[4 * step + i];
      },
      [&](int step, int n, std::uint32_t(&r)[4]) {
        load_matrices<true>(shared_address(value + (16 * step + lane % 16) * Config::kPitch + n + lane / 16 * 8), r);
      });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads) sage3_sm80(const __grid_constant__ Sage3Sm80Arguments a) {
  using T = typename Config::T;
  extern __shared__ __align__(128) unsigned char memory[];
  T* query = reinterpret_cast<T*>(memory);
  T* key = query + Config::kRows * Config::kPitch;
  T* value = Config::kHasValueBuffer ? key + Config::kKeys * Config::kPitch : key;
  const AttentionProblem& p = a.problem;
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Tile tile = tile_at<Config::kRows>(p, a.order, blockIdx.x);
  const KeyBlocks<Config::kKeys> blocks(p, tile);
  if (blocks.total() == 0) return store_nothing<T>(p, tile, warp_row);

  const auto copy_block = [&](T* to, int i, const void* KeySegment::*data) {
    const KeySegment& segment = a.numbers.key_segments[blocks.segment_of(i)];
    const Strides& its = segment.key_strides;  // V's are the same
    copy_tokens<Config, Config::kKeys>(
        to, static_cast<const T*>(segment.*data) + tile.batch * its.batch + tile.kv_head * its.head, its.token,
        blocks.key_of(i), static_cast<int>(segment.keys), a.images.channels);
  };
  const QuerySegment& rows = a.numbers.queries[tile.segment];
  copy_tokens<Config, Config::kRows>(
      query, static_cast<const T*>(rows.data) + tile.batch * rows.strides.batch + tile.head * rows.strides.head,
      rows.strides.token, tile.row, tile.row + tile.rows, a.images.channels);
  copy_block(key, 0, &KeySegment::key);

  Sage3Softmax softmax;
  float query_scale[2];
  read_query_scales(p, a.images, tile, warp_row, query_scale);
  float out[1][Config::kHead / 2] = {};
  for (int i = 0; i < blocks.total(); ++i) {
    await_copies();  // K has come, and nobody reads V any more
    if constexpr (Config::kHasValueBuffer) copy_block(value, i, &KeySegment::value);
    const int segment = blocks.segment_of(i);
    const float* record = record_of(p, a.images, tile, segment, blocks.key_of(i));
    const float2 scales = *reinterpret_cast<const float2*>(record + kSage3KeyScale);
    const float scale[2] = {query_scale[0] * scales.x, query_scale[1] * scales.x};
    float logits[1][kSage3Logits] = {};
    multiply_keys_sm80<Config>(query + warp_row * Config::kPitch, key, logits);
    Sage3Softmax::to_logits(logits[0], scale, [&](int four) {
      return *reinterpret_cast<const float4*>(record + 16 * four + 4 * (lane % 4));
    });
    if (blocks.hides(i)) hide_sage3_keys(p, a.images, tile, warp_row, segment, blocks.key_of(i), logits[0]);
    float rescale[2];
    softmax.soften(logits[0], rescale);
    const float of_values = softmax.move_value_scale(scales.y);
#pragma unroll
    for (int j = 0; j < Config::kHead / 2; ++j) out[0][j] *= rescale[j / 2 % 2] * of_values;
    std::uint32_t probabilities[kSage3Logits / 2];
    softmax.pack_numbers<T>(logits[0], probabilities);
    if constexpr (!Config::kHasValueBuffer) {
      __syncthreads();  // nobody reads K any more
      copy_block(value, i, &KeySegment::value);
    }
    await_copies();  // V has come, and nobody reads K any more
    if (Config::kHasValueBuffer && i + 1 < blocks.total()) copy_block(key, i + 1, &KeySegment::key);
    multiply_packed<Config>(probabilities, value, out);
    if constexpr (!Config::kHasValueBuffer) {
      __syncthreads();  // nobody reads V any more
      if (i + 1 < blocks.total()) copy_block(key, i + 1, &KeySegment::key);
    }
  }
  __syncthreads();  // nobody reads Q, K and V any more
  constexpr int kScratch = (Config::kHead + 63) / 64 * 2048;
  static_assert(4 * kScratch <= Config::kSharedBytes);
  const unsigned scratch = shared_address(memory) + threadIdx.x / 32 * kScratch;
  softmax.finish();
  const float factor[2] = {softmax.factor(0), softmax.factor(1)};
  finish_sage3_rows<Config::kHead>(p, a.images, tile, softmax, factor, out[0]);
  finish_tile<T, Config::kHead>(p, tile, warp_row, scratch, softmax, factor, out[0], a.aligned_output, a.adds_lse);
}

}  // namespace ditattn::kernels::cuda
