#include "registry/check_tensor.hpp"

#include <fmt/format.h>

#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

void check_defined(const char* what, const Tensor& tensor) {
  if (!tensor.defined()) throw ValueError(fmt::format("{} is missing.", what));
}

}  // namespace

bool same_device(DLDevice a, DLDevice b) { return a.device_type == b.device_type && a.device_id == b.device_id; }

void check_unit_last_stride(const char* what, const Tensor& tensor) {
  const Extent extent(tensor);
  const int last = extent.rank - 1;
  if (extent.sizes[last] > 1 && extent.strides[last] != 1 &&
      tensor.numel() > 0) {  // NumPy gives empty arrays zero strides
    throw ValueError(
        fmt::format("{} must have a unit last stride, got strides {} for shape {}. Make it contiguous first.", what,
                    strides_name(tensor), shape_name(tensor)));
  }
}

void check_rank_4(const char* what, const Tensor& tensor) {
  check_defined(what, tensor);
  if (tensor.ndim() != 4) {
    throw ValueError(fmt::format("{} must have 4 dimensions (batch, tokens, heads, head_size), got shape {}.", what,
                                 shape_name(tensor)));
  }
}

void check_input(const char* what, const Tensor& tensor) {
  check_rank_4(what, tensor);
  if (tensor.dtype().lanes != 1 || tensor.dtype().bits % 8 != 0) {
    throw ValueError(
        fmt::format("{} has dtype {}, which is not a plain element type.", what, dtype_name(tensor.dtype())));
  }
  check_extent(what, tensor);
  check_unit_last_stride(what, tensor);
}

void check_size(const char* what, const Tensor& tensor, int dimension, const char* name, std::int64_t expected) {
  const std::int64_t size = tensor.shape().data()[dimension];
  if (size != expected) {
    throw ValueError(
        fmt::format("{} has {}={}, expected {} (shape {}).", what, name, size, expected, shape_name(tensor)));
  }
}

}  // namespace ditattn
