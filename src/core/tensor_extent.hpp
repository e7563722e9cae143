#pragma once

#include <cstdint>
#include <string>

#include "ditattn/tensor.hpp"

namespace ditattn {

/// A tensor's sizes and strides, for as long as it lives. `size(i)`, `stride(i)` and `strides()` check at each look and
/// are not inlined, which took most of the time that checking a call takes.
struct Extent {
  const std::int64_t* sizes;
  const std::int64_t* strides;
  int rank;

  explicit Extent(const Tensor& tensor)
      : sizes(tensor.GetDLTensorPtr()->shape), strides(tensor.GetDLTensorPtr()->strides), rank(tensor.ndim()) {}
};

/// "(6, 2, 1)", in elements.
std::string strides_name(const Tensor& tensor);

/// ValueError that names `what` where a size is negative, there are 2^62 elements or the farthest is 2^62 bytes away,
/// or there are elements and no data.
void check_extent(const char* what, const Tensor& tensor);

}  // namespace ditattn
