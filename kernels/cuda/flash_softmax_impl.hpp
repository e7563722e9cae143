#pragma once

/// The softmax of the kernels on matrix units. Included by .cu files alone.

#include "kernels/cuda/flash_mask_impl.hpp"

namespace ditattn::kernels::cuda {

__device__ __forceinline__ float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The online softmax of a thread's two rows, to the base 2. Logits are taken relative to a reference that only has to
/// be near the maximum, and moves where it is not, so that most blocks leave the sums as they are, and, once there is
/// one, no maximum has to be known before the exponentials: too large sums tell of a reference that is too small.
/// `Limits`: kSlack, how far above 1 exact steps let the largest probability be, as a power of two; kTop, what it is
/// after a reference has moved; kLargest, of a thread's sum over a block, in other steps; kOrigin, what logits have for
/// 0.
template <class Limits>
struct BasicSoftmax {
  static constexpr float kLargest = Limits::kLargest;
  static constexpr float kOrigin = Limits::kOrigin;

  float reference[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  ///< this thread's columns

  /// Moves the references to the maxima where they are far below; leaves what sums so far have to be multiplied with.
  template <int kCount>
  __device__ __forceinline__ void find_reference(const float (&logits)[kCount], const float (&scale)[2],
                                                 float (&rescale)[2]) {
    float top[2][4];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      float& partial = top[k / 2 % 2][k / 4 % 2 * 2 + k % 2];
      partial = k < 8 ? logits[k] : fmaxf(partial, logits[k]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x = (fmaxf(fmaxf(top[i][0], top[i][1]), fmaxf(top[i][2], top[i][3])) - Limits::kOrigin) * scale[i];
      x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
      x = fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
      const bool moves = x - reference[i] > Limits::kSlack;
      x -= Limits::kTop;
      rescale[i] = moves ? exp2_unit(reference[i] - x) : 1;
      reference[i] = moves ? x : reference[i];
    }
  }

  /// Turns logits into probabilities, times 2^reference; a row that sees nothing has none.
  template <int kCount>
  __device__ __forceinline__ void exponentiate(float (&logits)[kCount], const float (&scale)[2]) const {
    float subtract[2] = {reference[0] == -INFINITY ? 0 : reference[0], reference[1] == -INFINITY ? 0 : reference[1]};
    if constexpr (Limits::kOrigin != 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) subtract[i] = fmaf(Limits::kOrigin, scale[i], subtract[i]);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) logits[k] = exp2_unit(fmaf(logits[k], scale[k / 2 % 2], -subtract[k / 2 % 2]));
  }

  template <int kCount>
  __device__ __forceinline__ static void add(const float (&probabilities)[kCount], float (&total)[2]) {
    float partial[2][4];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      float& x = partial[k / 2 % 2][k / 4 % 2 * 2 + k % 2];
      x = k < 8 ? probabilities[k] : x + probabilities[k];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) total[i] = (partial[i][0] + partial[i][1]) + (partial[i][2] + partial[i][3]);
  }

  /// Moves the references of rows of which a thread's total is too large by a power of two, and what was made with
  /// them. Infinite probabilities stay: such a row is computed again.
  template <int kCount>
  __device__ void lower(float (&probabilities)[kCount], float (&total)[2], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float x = total[i];
      x = fmaxf(x, __shfl_xor_sync(kWarp, x, 1));
      x = fmaxf(x, __shfl_xor_sync(kWarp, x, 2));
      const int exponent = (__float_as_int(x) >> 23) - 127 - static_cast<int>(Limits::kTop);
      const bool moves = x > kLargest && exponent < 127;
      rescale[i] = moves ? __int_as_float((127 - exponent) << 23) : 1;
      reference[i] += moves ? static_cast<float>(exponent) : 0;
      total[i] *= rescale[i];
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) probabilities[k] *= rescale[k / 2 % 2];
  }

  /// Whether logits differ so much that a reference found in one block might be exceeded by more than float32 holds in
  /// another: a sample of them, a row at a time.
  template <int kCount>
  __device__ __forceinline__ static bool are_wild(const float (&logits)[kCount], const float (&scale)[2]) {
    constexpr float wild = 20;
    float high[2] = {-INFINITY, -INFINITY};
    float low[2] = {INFINITY, INFINITY};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (k / 4 % 4 != 0) continue;
      const int i = k / 2 % 2;
      high[i] = fmaxf(high[i], logits[k]);
      low[i] = logits[k] == -INFINITY ? low[i] : fminf(low[i], logits[k]);  // not what is hidden
    }
    return fmaxf((high[0] - low[0]) * scale[0], (high[1] - low[1]) * scale[1]) > wild;
  }

  /// Joins the four threads of a row.
  __device__ void finish() {
#pragma unroll
    for (float& x : sum) {
      x += __shfl_xor_sync(kWarp, x, 1);
      x += __shfl_xor_sync(kWarp, x, 2);
    }
  }
};

/// For probabilities of 16 bits and more.
struct WideLimits {
  static constexpr float kSlack = 8;
  static constexpr float kTop = 0;
  static constexpr float kLargest = 4096;
  static constexpr float kOrigin = 0;
};
using Softmax = BasicSoftmax<WideLimits>;

}  // namespace ditattn::kernels::cuda
