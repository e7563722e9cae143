#include "core/tensor_extent.hpp"

#include <fmt/format.h>

#include <cmath>

#include "ditattn/errors.hpp"

namespace ditattn {

std::string strides_name(const Tensor& tensor) {
  return shape_name({tensor.strides().data(), static_cast<std::size_t>(tensor.ndim())});
}

// In float64, which is exact enough for a bound and cannot overflow here: this is done for each tensor of each call.
void check_extent(const char* what, const Tensor& tensor) {
  constexpr auto most = static_cast<double>(std::int64_t{1} << 62);
  const Extent extent(tensor);
  const std::int64_t bytes = tensor.dtype().bits / 8;
  const auto item = static_cast<double>(bytes);
  double count = 1;
  double reach = item;
  for (int i = 0; i < extent.rank; ++i) {
    const std::int64_t size = extent.sizes[i];
    if (size < 0) throw ValueError(fmt::format("{} has a negative size: {}.", what, shape_name(tensor)));
    count *= static_cast<double>(size);
    if (size > 1) reach += std::abs(static_cast<double>(extent.strides[i])) * static_cast<double>(size - 1) * item;
  }
  if (!(count < most && reach < most)) {
    throw ValueError(fmt::format("{} of shape {} and strides {} reaches past what can be addressed.", what,
                                 shape_name(tensor), strides_name(tensor)));
  }
  if (count > 0 && tensor.data_ptr() == nullptr) {
    throw ValueError(fmt::format("{} of shape {} has a null data pointer.", what, shape_name(tensor)));
  }
}

}  // namespace ditattn
