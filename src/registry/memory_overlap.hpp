#pragma once

#include "ditattn/tensor.hpp"

namespace ditattn {

/// Whether two elements of `tensor` may share memory: sure where it says no, conservative where it says yes (strides
/// that do not nest).
bool overlaps_itself(const Tensor& tensor);

/// Whether two tensors share a byte. Exact for tensors whose last dimension is dense, interleaved views of one buffer
/// included: compares the ranges first, and only where these meet the rows.
bool share_memory(const Tensor& a, const Tensor& b);

}  // namespace ditattn
