#pragma once

#include "ditattn/tensor.hpp"

namespace ditattn::parallel {

/// Attention over some keys and over some others becomes attention over all of them: `out` (B, S, H, D) and `lse`
/// (B, S, H, 1), both float32, take in `part_out`, of the same shape in float32, float16 or bfloat16, and `part_lse`.
/// In float32, one row at a time: the same numbers come out whatever the threads. Where one side's LSE is −∞, the other
/// stays as it is, whatever stands there; a NaN in an LSE makes the row NaN. Any strides with a unit last one.
void merge(const Tensor& out, const Tensor& lse, const Tensor& part_out, const Tensor& part_lse);

/// No keys yet: zeros and −∞.
void clear(const Tensor& out, const Tensor& lse);

/// Rounds float32 `from` to `to`'s dtype (nearest even). Same shape (B, S, H, D).
void convert(const Tensor& to, const Tensor& from);

}  // namespace ditattn::parallel
