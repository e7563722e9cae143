#pragma once

/// What hides and biases logits, for the kernels on matrix units. Included by .cu files alone.

#include "kernels/cuda/flash_tile_impl.hpp"

namespace ditattn::kernels::cuda {

/// A mask's element for a row and a key of its segment; 0 where the mask has no such row.
__device__ inline float mask_of(const KeySegment& segment, const Tile& tile, int row, int key) {
  const Mask& mask = segment.mask;
  const std::int64_t mask_row = row - mask.first_row;
  if (mask.data == nullptr || mask_row < 0 || mask_row >= mask.rows) return 0;
  return load_mask(mask, tile.batch * mask.strides.batch + mask_row * mask.strides.token +
                             tile.head * mask.strides.head + key * mask.key_stride);
}

/// The keys of a segment that a thread's two rows see, masks aside.
struct RowLimits {
  int2 keys[2];
  __device__ void find(const AttentionProblem& p, const KeySegment& segment, const Tile& tile, int warp_row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + static_cast<int>(threadIdx.x % 32) / 4 + 8 * i;
      keys[i] = row < tile.rows ? keys_of_row(p, segment, tile.batch, tile.first_row + row) : make_int2(0, 0);
    }
  }
};

/// Which of 32 keys are in [first, last), as bits.
__device__ __forceinline__ std::uint32_t bits_between(int first, int last) {
  const int begin = min(max(first, 0), 32);
  const int end = min(max(last, begin), 32);
  std::uint32_t bits;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(begin), "r"(end - begin));
  return bits;
}

/// Which of a block's keys a thread's two rows see: bits, shifted so that the thread's own columns are at 8 · j + c.
template <int kKeys>
struct SeenBits {
  static constexpr int kWords = (kKeys + 31) / 32;
  std::uint32_t words[2][kWords];

  __device__ static int shift() { return 2 * static_cast<int>(threadIdx.x % 4); }

  __device__ __forceinline__ void see_all() {
#pragma unroll
    for (int w = 0; w < 2 * kWords; ++w) words[w / kWords][w % kWords] = 0xFFFFFFFF;
  }

  /// Hides what is outside the rows' limits; `first_key` is the block's.
  __device__ __forceinline__ void limit(const RowLimits& limits, int first_key) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int2 keys = limits.keys[i];
        words[i][w] &= bits_between(keys.x - first_key - 32 * w, keys.y - first_key - 32 * w) >> shift();
      }
    }
  }

  __device__ __forceinline__ void hide(float (&logits)[kKeys / 2]) const {
#pragma unroll
    for (int k = 0; k < kKeys / 2; ++k) {
      const int j = k / 4;
      const std::uint32_t bit = 1U << (j % 4 * 8 + k % 2);
      logits[k] = (words[k / 2 % 2][j / 4] & bit) != 0 ? logits[k] : -INFINITY;
    }
  }
};

/// Where a mask's elements for a thread's two rows and the first key are, and whether there are any.
template <class M>
struct MaskRows {
  const M* elements[2];
  bool has[2];

  __device__ MaskRows(const Mask& mask, const Tile& tile, int warp_row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + static_cast<int>(threadIdx.x % 32) / 4 + 8 * i;
      const std::int64_t mask_row = tile.first_row + row - mask.first_row;
      has[i] = row < tile.rows && mask_row >= 0 && mask_row < mask.rows;
      elements[i] = static_cast<const M*>(mask.data) + tile.batch * mask.strides.batch +
                    clamp(mask_row, 0, mask.rows - 1) * mask.strides.token + tile.head * mask.strides.head;
    }
  }
};

/// Whether a row of a mask is pieces of `kCount` elements that are read at once.
template <class M, int kCount>
__device__ bool lies_in_pieces(const Mask& mask) {
  return mask.key_stride == 1 && ((mask.strides.batch | mask.strides.token | mask.strides.head) & (kCount - 1)) == 0 &&
         reinterpret_cast<std::uintptr_t>(mask.data) % (kCount * sizeof(M)) == 0;
}

// A bit for each byte that is not 0.
__device__ __forceinline__ std::uint32_t bits_of(std::uint32_t bytes) {
  const std::uint32_t high = (((bytes & 0x7F7F7F7F) + 0x7F7F7F7F) | bytes) & 0x80808080;
  return ((high >> 7) * 0x01020408) >> 24;
}

constexpr int kMaskPiece = 16;  // bytes

/// Hides what a boolean mask hides, of which each thread of a row's four reads every fourth piece.
template <int kKeys>
__device__ __forceinline__ void hide_with_mask(const KeySegment& segment, const Tile& tile, int warp_row, int first_key,
                                               SeenBits<kKeys>& seen) {
  const MaskRows<unsigned char> rows(segment.mask, tile, warp_row);
  const int own = static_cast<int>(threadIdx.x % 4);
  const int keys = min(static_cast<int>(segment.keys) - first_key, kKeys);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int g = 0; g < (kKeys + 63) / 64; ++g) {
      const int first = 64 * g + kMaskPiece * own;
      uint4 piece = make_uint4(1, 1, 1, 1);
      if (first < keys) piece = *reinterpret_cast<const uint4*>(rows.elements[i] + first_key + first);
      std::uint32_t bits = bits_of(piece.x) | bits_of(piece.y) << 4 | bits_of(piece.z) << 8 | bits_of(piece.w) << 12;
      bits = rows.has[i] ? bits << own % 2 * 16 : 0xFFFFFFFF;
      bits |= __shfl_xor_sync(kWarp, bits, 1);
      const std::uint32_t other = __shfl_xor_sync(kWarp, bits, 2);
      seen.words[i][2 * g] &= (own < 2 ? bits : other) >> seen.shift();
      if (2 * g + 1 < seen.kWords) seen.words[i][2 * g + 1] &= (own < 2 ? other : bits) >> seen.shift();
    }
  }
}

__device__ inline float widen(unsigned char seen) { return seen != 0 ? 0 : -INFINITY; }

/// Two neighbours of a mask, in one load.
template <class M>
struct alignas(2 * sizeof(M)) MaskPair {
  M first;
  M second;
};

/// Gives the unscaled logits of keys from `first_key` on what a mask of elements M adds to them, before a product is
/// added up there: so the mask needs no registers of its own. Keys past the end are hidden later.
template <class M, int kCount>
__device__ __forceinline__ void start_with_mask(const AttentionProblem& p, const KeySegment& segment, const Tile& tile,
                                                int warp_row, int first_key, float (&logits)[kCount]) {
  const Mask& mask = segment.mask;
  const MaskRows<M> rows(mask, tile, warp_row);
  const int column = first_key + 2 * static_cast<int>(threadIdx.x % 4);
  const int last_key = static_cast<int>(segment.keys) - 1;
  const bool in_pairs = lies_in_pieces<M, 2>(mask) && first_key + 2 * kCount - 1 <= last_key;
  const float unscale = 1 / p.scale;
  // A finite bias stays finite, as it hides nothing, also times the scale and log₂ e later. NaN stays NaN.
  const float lowest = fmaxf(-2e38F * unscale, -3.4e38F);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto start = [&](int j, int c, M element) {
      const float bias = widen(element);
      const float x = sizeof(M) == 1 ? bias : bias * unscale;
      const bool sinks = sizeof(M) > 1 && x < lowest && bias != -INFINITY;
      logits[4 * j + 2 * i + c] = !rows.has[i] ? 0 : sinks ? lowest : x;
    };
    if (in_pairs) {
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        const auto pair = *reinterpret_cast<const MaskPair<M>*>(rows.elements[i] + column + 8 * j);
        start(j, 0, pair.first);
        start(j, 1, pair.second);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) start(j, c, rows.elements[i][min(column + 8 * j + c, last_key) * mask.key_stride]);
      }
    }
  }
}

/// What a segment's mask, if it has one, makes of a block before its product: what logits start with, and what is seen.
template <int kKeys>
__device__ __forceinline__ void apply_mask(const AttentionProblem& p, const KeySegment& segment, const Tile& tile,
                                           int warp_row, int first_key, float (&logits)[kKeys / 2],
                                           SeenBits<kKeys>& seen) {
  const bool whole = segment.mask.type == ElementType::boolean && segment.keys % kMaskPiece == 0 &&
                     lies_in_pieces<unsigned char, kMaskPiece>(segment.mask);
  if (segment.mask.data == nullptr || whole) {
#pragma unroll
    for (float& logit : logits) logit = 0;
    if (segment.mask.data != nullptr) hide_with_mask(segment, tile, warp_row, first_key, seen);
    return;
  }
  switch (segment.mask.type) {
    case ElementType::boolean:
      return start_with_mask<unsigned char>(p, segment, tile, warp_row, first_key, logits);
    case ElementType::float16:
      return start_with_mask<__half>(p, segment, tile, warp_row, first_key, logits);
    case ElementType::bfloat16:
      return start_with_mask<__nv_bfloat16>(p, segment, tile, warp_row, first_key, logits);
    default:
      return start_with_mask<float>(p, segment, tile, warp_row, first_key, logits);
  }
}

}  // namespace ditattn::kernels::cuda
