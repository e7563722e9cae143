#pragma once

#include <string>

#include "ditattn/tensor.hpp"

namespace ditattn {

/// "(6, 2, 1)", in elements.
std::string strides_name(const Tensor& tensor);

/// ValueError that names `what` where a size is negative, the farthest element's offset in bytes does not fit in 63
/// bits, or there are elements and no data.
void check_extent(const char* what, const Tensor& tensor);

}  // namespace ditattn
