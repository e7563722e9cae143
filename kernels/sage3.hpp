#pragma once

/// What every kernel of SAGE_ATTN_3 has in common. docs/kernels/sage3.md defines the arithmetic.

#include "kernels/nvfp4.hpp"

namespace ditattn::kernels {

/// Keys of a block: K and V have a float32 scale per block, and so have a row's probabilities.
inline constexpr int kSage3Keys = 128;

/// A mean is taken off a channel of Q or V where it is at least 1 / so much of the channel's largest number, and more
/// than so many numbers have it: no single one can then move it far.
inline constexpr int kSage3LeastMean = 64;

/// Blocks and rows whose largest number is no larger count as zeros: a scale would be subnormal.
inline constexpr float kSage3LeastNumber = 1e-30F;

/// A row's probabilities are 1 at most; this makes the largest group scale of them 448.
inline constexpr float kSage3ProbabilityMost = E4m3::kMost * E2m1::kMost;

/// Which tensors are less their channels' means before they are quantized.
struct Sage3Smoothing {
  bool query = true;
  bool key = true;
  bool value = true;
};

}  // namespace ditattn::kernels
