#pragma once

#include "ditattn/tensor.hpp"

namespace ditattn::parallel {

/// Results for some keys: `out` (B, S, H, D) in any float type and `lse` (B, S, H, 1) in float32. Any strides with a
/// unit last one.
struct Part {
  Tensor out;
  Tensor lse;
};

/// Attention over the keys of `a` and over those of `b` becomes attention over all of them; `to` may be `a`. `b` in
/// float32, float16 or bfloat16, the others in its dtype or in float32. In float32, one row at a time: the same numbers
/// come out whatever the threads. Where one side's LSE is −∞, the other stays as it is, whatever stands there; a NaN in
/// an LSE makes the row NaN.
void merge(const Part& to, const Part& a, const Part& b);

/// No keys yet: zeros and −∞, in float32.
void clear(const Part& part);

/// Rounds float32 `from` to `to`'s dtype (nearest even). Same shape (B, S, H, D).
void convert(const Tensor& to, const Tensor& from);

}  // namespace ditattn::parallel
