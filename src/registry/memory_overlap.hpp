#pragma once

#include <cstdint>

#include "ditattn/tensor.hpp"

namespace ditattn {

/// Whether two elements of `tensor` may share memory: sure where it says no, conservative where it says yes (strides
/// that do not nest).
bool overlaps_itself(const Tensor& tensor);

/// The bytes from a tensor's first to its last; empty where it has none.
struct MemoryRange {
  std::intptr_t begin = 0;
  std::intptr_t end = 0;
  [[nodiscard]] bool meets(const MemoryRange& other) const { return begin < other.end && other.begin < end; }
};
MemoryRange range_of(const Tensor& tensor);

/// Whether two tensors share a byte. Exact for tensors whose last dimension is dense, interleaved views of one buffer
/// included: compares the ranges first, and only where these meet the rows.
bool share_memory(const Tensor& a, const Tensor& b);

}  // namespace ditattn
