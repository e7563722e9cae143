#pragma once

/// The softmax of SAGE_ATTN_3, and what else its kernels have in common. Included by .cu files alone.

#include "kernels/cuda/flash_rows_impl.hpp"
#include "kernels/cuda/nvfp4_impl.hpp"
#include "kernels/cuda/sage3_images.hpp"
#include "kernels/cuda/sage_tile_impl.hpp"

namespace ditattn::kernels::cuda {

constexpr int kSage3Logits = kSage3Keys / 2;  // of a thread: two rows

/// The online softmax of a thread's two rows, to the base 2. Probabilities of a block are relative to its own largest,
/// as the numbers are: sums of P · V are in units of the last block's reference and V's scale, so that no second sums
/// are needed. A block whose logits are far below those before has a higher reference: its numbers weigh nothing, and
/// what is summed up must not overflow.
struct Sage3Rows {
  static constexpr float kMostBelow = 40;  // of a reference below the largest logit so far, to the base 2

  float top[2] = {-INFINITY, -INFINITY};  // the largest logits so far
  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // this thread's columns
  float value_scale = 1;  // of the last block

  /// For a block of which `most` is the row's largest logit: what logits are less, and what sums so far have to be
  /// multiplied with, V's scales aside.
  __device__ __forceinline__ float move_reference(int row, float most, float& rescale) {
    top[row] = fmaxf(top[row], most);
    const float before = reference[row];
    reference[row] = fmaxf(most, top[row] - kMostBelow);
    const bool none = reference[row] == -INFINITY;
    rescale = none ? 1 : exp2_unit(before - reference[row]);
    return none ? 0 : reference[row];
  }

  /// The next block's scale of V: what sums so far have to be multiplied with for it.
  __device__ __forceinline__ float move_value_scale(float next) {
    const float factor = __fdividef(value_scale, next);
    value_scale = next;
    return factor;
  }

  /// Joins the four threads of a row.
  __device__ void finish() {
#pragma unroll
    for (float& x : sum) {
      x += __shfl_xor_sync(kWarp, x, 1);
      x += __shfl_xor_sync(kWarp, x, 2);
    }
  }

  /// What a row's sums have to be multiplied with; NaN where it has to be computed again.
  __device__ float factor(int row) const {
    if (sum[row] == 0) return 0;
    return __fdividef(value_scale * (1 / kSage3ProbabilityMost), sum[row]);
  }
};

/// A group's scale and what probabilities are multiplied with for its numbers, where `largest` is its largest logit
/// less the reference.
struct ProbabilityGroup {
  float scale;
  float inverse;
  __device__ __forceinline__ explicit ProbabilityGroup(float largest) {
    scale = round_to_e4m3(exp2_unit(largest) * E4m3::kMost);
    inverse = scale == 0 ? 0 : __fdividef(kSage3ProbabilityMost, scale);
  }
};

/// That of the emulation: a thread has 32 successive keys of each row, two groups.
struct Sage3Softmax : Sage3Rows {
  float group_scale[2][2];

  /// Sums of products to logits to the base 2. `correction(i)` gives four of the thread's keys.
  template <class Correction>
  __device__ __forceinline__ static void to_logits(float (&x)[kSage3Logits], const float (&scale)[2],
                                                   const Correction& correction) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 four = correction(i);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int at = 8 * i + 2 * row;
        x[at] = fmaf(x[at], scale[row], four.x);
        x[at + 1] = fmaf(x[at + 1], scale[row], four.y);
        x[at + 4] = fmaf(x[at + 4], scale[row], four.z);
        x[at + 5] = fmaf(x[at + 5], scale[row], four.w);
      }
    }
  }

  /// Logits to numbers that are not rounded yet. `rescale` is what sums so far have to be multiplied with, V's scales
  /// aside.
  __device__ __forceinline__ void soften(float (&x)[kSage3Logits], float (&rescale)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float of_group[2];
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        float most = -INFINITY;
#pragma unroll
        for (int k = 0; k < 16; ++k) most = fmaxf(most, x[at(row, g, k)]);
        of_group[g] = most;
      }
      float most = fmaxf(of_group[0], of_group[1]);
      most = fmaxf(most, __shfl_xor_sync(kWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kWarp, most, 2));
      const float subtract = move_reference(row, most, rescale[row]);
      float total = 0;
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const ProbabilityGroup group(of_group[g] - subtract);
        group_scale[row][g] = group.scale;
#pragma unroll
        for (int k = 0; k < 16; ++k) {
          float& logit = x[at(row, g, k)];
          const float p = exp2_unit(logit - subtract);
          total += p;
          logit = p * group.inverse;
        }
      }
      sum[row] = fmaf(sum[row], rescale[row], total);
    }
  }

  /// Numbers of e2m1 times their groups' scales, in pairs, as products want them.
  template <class T>
  __device__ __forceinline__ void pack_numbers(const float (&x)[kSage3Logits],
                                               std::uint32_t (&packed)[kSage3Logits / 2]) const {
    std::uint32_t scale[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) scale[i / 2][i % 2] = pack(group_scale[i / 2][i % 2], group_scale[i / 2][i % 2], T{});
#pragma unroll
    for (int i = 0; i < kSage3Logits / 2; ++i) {
      packed[i] = round_pair_to_e2m1(x[2 * i], x[2 * i + 1], scale[i % 2][i / 16], T{});
    }
  }

 private:
  // Element of a row's group, in the order of its keys.
  __device__ static constexpr int at(int row, int group, int key) {
    return 32 * group + key / 2 * 4 + 2 * row + key % 2;
  }
};

/// Hides keys that a warp's 16 rows do not see of the block of a segment from `first_key` on.
__device__ __forceinline__ void hide_sage3_keys(const AttentionProblem& p, const Sage3Images& images, const Tile& tile,
                                                int warp_row, int segment, int first_key, float (&x)[kSage3Logits]) {
  RowLimits limits;
  limits.find(p, p.key_segments[segment], tile, warp_row);
  const int own = static_cast<int>(threadIdx.x % 4);
  std::uint32_t seen = 0xFFFFFFFF;
  if (p.key_segments[segment].mask.data != nullptr) {
    const int block = (segment == 1 ? images.key_blocks[0] : 0) + first_key / kSage3Keys;
    seen = images.key_bits[(static_cast<std::size_t>(tile.batch) * images.blocks() + block) * (kSage3Keys / 32) + own];
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int begin = min(max(limits.keys[row].x - first_key - 32 * own, 0), 32);
    const int end = min(max(limits.keys[row].y - first_key - 32 * own, begin), 32);
    std::uint32_t bits;
    asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(begin), "r"(end - begin));
    bits &= seen;
#pragma unroll
    for (int k = 0; k < 32; ++k) {
      float& logit = x[k / 2 * 4 + 2 * row + k % 2];
      logit = (bits & 1U << k) != 0 ? logit : -INFINITY;
    }
  }
}

/// What sums of P · V are the output of.
template <int kHead>
__device__ __forceinline__ void finish_sage3_rows(const AttentionProblem& p, const Sage3Images& images,
                                                  const Tile& tile, const Sage3Rows& softmax, const float (&factor)[2],
                                                  float (&out)[kHead / 2]) {
  const std::size_t source = static_cast<std::size_t>(p.batch + tile.batch) * p.kv_heads + tile.kv_head;
  const float* mean = images.means + source * images.channels;
#pragma unroll
  for (int j = 0; j < kHead / 8; ++j) {
    const int channel = 8 * j + 2 * static_cast<int>(threadIdx.x % 4);
    const float2 add = channel < images.channels ? *reinterpret_cast<const float2*>(mean + channel) : make_float2(0, 0);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool sees = softmax.sum[row] != 0;
      float* at = out + 4 * j + 2 * row;
      at[0] = fmaf(at[0], factor[row], sees ? add.x : 0);
      at[1] = fmaf(at[1], factor[row], sees ? add.y : 0);
    }
  }
}

/// The scales of a thread's two rows of Q.
__device__ __forceinline__ void read_query_scales(const AttentionProblem& p, const Sage3Images& images,
                                                  const Tile& tile, int warp_row, float (&scale)[2]) {
  const std::size_t head = static_cast<std::size_t>(tile.batch) * p.heads + tile.head;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp_row + static_cast<int>(threadIdx.x % 32) / 4 + 8 * i;
    scale[i] = row < tile.rows ? images.query_scale[head * p.rows + tile.first_row + row] : 0;
  }
}

/// Of a block of keys, for the tile's query head.
__device__ __forceinline__ const float* record_of(const AttentionProblem& p, const Sage3Images& images,
                                                  const Tile& tile, int segment, int key) {
  const std::size_t head = static_cast<std::size_t>(tile.batch) * p.heads + tile.head;
  const int block = (segment == 1 ? images.key_blocks[0] : 0) + key / kSage3Keys;
  return images.records + (head * images.blocks() + block) * kSage3Record;
}

/// Writes a warp's rows of the output and its log-sum-exp by way of shared memory, and computes those again that are
/// not finite.
template <class T, int kHead>
__device__ __forceinline__ void finish_tile(const AttentionProblem& p, const Tile& tile, int warp_row, unsigned scratch,
                                            const Sage3Rows& softmax, const float (&factor)[2],
                                            const float (&out)[kHead / 2], bool aligned_output, bool adds_lse) {
  const float one[2] = {1, 1};
  gather_rows<T>(scratch, one, out);
  if (aligned_output) {
    store_gathered<T, kHead / 8>(p, tile, warp_row, scratch);
  } else {
    store_elements<T>(p, tile, warp_row, scratch);
  }
  store_lse(p, tile, warp_row, softmax, adds_lse);
  if (!are_broken(factor, true, out)) return;
  __syncwarp();
  mend_rows<T, kHead>(p, tile, warp_row);
}

}  // namespace ditattn::kernels::cuda
