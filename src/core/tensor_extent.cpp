#include "core/tensor_extent.hpp"

#include <fmt/format.h>

#include "ditattn/errors.hpp"

namespace ditattn {

std::string strides_name(const Tensor& tensor) {
  return shape_name({tensor.strides().data(), static_cast<std::size_t>(tensor.ndim())});
}

void check_extent(const char* what, const Tensor& tensor) {
  const Extent extent(tensor);
  const std::int64_t item = tensor.dtype().bits / 8;
  std::int64_t count = 1;
  std::int64_t reach = item;
  bool overflow = false;
  for (int i = 0; i < extent.rank; ++i) {
    const std::int64_t size = extent.sizes[i];
    if (size < 0) throw ValueError(fmt::format("{} has a negative size: {}.", what, shape_name(tensor)));
    std::int64_t span = 0;
    const std::int64_t stride = extent.strides[i];
    overflow |= stride == INT64_MIN || __builtin_mul_overflow(count, size, &count) ||
                __builtin_mul_overflow(stride < 0 ? -stride : stride, size > 0 ? size - 1 : 0, &span) ||
                __builtin_mul_overflow(span, item, &span) || __builtin_add_overflow(reach, span, &reach);
  }
  if (overflow) {
    throw ValueError(fmt::format("{} of shape {} and strides {} reaches past what can be addressed.", what,
                                 shape_name(tensor), strides_name(tensor)));
  }
  if (count > 0 && tensor.data_ptr() == nullptr) {
    throw ValueError(fmt::format("{} of shape {} has a null data pointer.", what, shape_name(tensor)));
  }
}

}  // namespace ditattn
