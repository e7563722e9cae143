#include "ditattn/tensor.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/float_bits.hpp"
#include "core/tensor_extent.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

struct NamedType {
  const char* name;
  const char* alias;
  DLDataType dtype;
};

constexpr NamedType kTypes[] = {
    {"float32", "f32", kFloat32}, {"float16", "f16", kFloat16}, {"bfloat16", "bf16", kBFloat16},
    {"float64", "f64", kFloat64}, {"bool", "bool", kBool},      {"int32", "i32", kInt32},
    {"int64", "i64", kInt64},
};

// Every allocation starts on a cache line, as vector loads and DLPack's consumers like.
constexpr std::size_t kAlignment = 64;

struct HostAllocator {
  void AllocData(DLTensor* tensor) {
    std::size_t bytes = tvm::ffi::GetDataSize(*tensor);
    bytes = (std::max<std::size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, bytes);
    if (tensor->data == nullptr) {
      throw MemoryError(fmt::format("Cannot allocate {} bytes for a tensor of shape {} and dtype {}.", bytes,
                                    shape_name({tensor->shape, static_cast<std::size_t>(tensor->ndim)}),
                                    dtype_name(tensor->dtype)));
    }
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

// The memory belongs to the caller; nothing to allocate or free.
struct BorrowedMemory {
  void* data;
  void AllocData(DLTensor* tensor) const { tensor->data = data; }
  void FreeData(DLTensor* /*tensor*/) const {}
};

void check_shape(std::span<const std::int64_t> shape, DLDataType dtype) {
  std::int64_t bits = std::max<std::int64_t>(std::int64_t{dtype.bits} * dtype.lanes, 8);  // tvm-ffi counts bits too
  bool overflow = false;
  for (std::int64_t extent : shape) {
    if (extent < 0) throw ValueError(fmt::format("Shape {} has a negative size.", shape_name(shape)));
    overflow = overflow || __builtin_mul_overflow(bits, std::max<std::int64_t>(extent, 1), &bits);
  }
  if (overflow) throw ValueError(fmt::format("Shape {} does not fit in memory.", shape_name(shape)));
}

}  // namespace

std::string dtype_name(DLDataType dtype) {
  for (const NamedType& type : kTypes) {
    if (type.dtype == dtype) return type.name;
  }
  return fmt::format("dtype(code={}, bits={}, lanes={})", dtype.code, dtype.bits, dtype.lanes);
}

DLDataType parse_dtype(std::string_view name) {
  std::vector<std::string_view> allowed;
  for (const NamedType& type : kTypes) {
    if (name == type.name || name == type.alias) return type.dtype;
    allowed.emplace_back(type.name);
  }
  throw ValueError(fmt::format("Unknown dtype '{}'. Valid dtypes are: {}", name, fmt::join(allowed, ", ")));
}

std::string_view device_type_name(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
      return "cpu";
    case kDLCUDA:
      return "cuda";
    case kDLROCM:
      return "rocm";
    default:
      return "unknown";
  }
}

std::string device_name(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
      return "cpu";
    case kDLCUDA:
      return fmt::format("cuda:{}", device.device_id);
    case kDLROCM:
      return fmt::format("rocm:{}", device.device_id);
    default:
      return fmt::format("device type {}:{}", static_cast<int>(device.device_type), device.device_id);
  }
}

std::string shape_name(std::span<const std::int64_t> shape) {
  return fmt::format("({}{})", fmt::join(shape, ", "), shape.size() == 1 ? "," : "");
}

std::string shape_name(const Tensor& tensor) {
  return shape_name({tensor.shape().data(), static_cast<std::size_t>(tensor.ndim())});
}

Tensor empty(std::span<const std::int64_t> shape, DLDataType dtype) {
  check_shape(shape, dtype);
  return Tensor::FromNDAlloc(HostAllocator{}, tvm::ffi::ShapeView(shape.data(), shape.size()), dtype, kCpu);
}

Tensor wrap(void* data, std::span<const std::int64_t> shape, DLDataType dtype, std::span<const std::int64_t> strides,
            DLDevice device) {
  check_shape(shape, dtype);
  const tvm::ffi::ShapeView shape_view(shape.data(), shape.size());
  if (strides.empty()) return Tensor::FromNDAlloc(BorrowedMemory{data}, shape_view, dtype, device);
  if (strides.size() != shape.size()) {
    throw ValueError(fmt::format("Shape {} has {} sizes, but {} strides were given.", shape_name(shape), shape.size(),
                                 strides.size()));
  }
  return Tensor::FromNDAllocStrided(BorrowedMemory{data}, shape_view,
                                    tvm::ffi::ShapeView(strides.data(), strides.size()), dtype, device);
}

std::int64_t alignment_of(const Tensor& tensor) {
  const std::int64_t item = tensor.dtype().bits / 8;
  auto bits = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(data_pointer(tensor))) | 16;
  const Extent extent(tensor);
  for (int i = 0; i + 1 < extent.rank; ++i) {
    if (extent.sizes[i] < 2) continue;
    if (extent.strides[i] < 0) return 0;
    bits |= static_cast<std::uint64_t>(extent.strides[i] * item);
  }
  return static_cast<std::int64_t>(bits & (~bits + 1));
}

double load_element(const void* data, std::int64_t index, DLDataType dtype) {
  const auto load = [&]<class T>(T value) {
    std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    return value;
  };
  if (dtype == kFloat32) return load(0.F);
  if (dtype == kFloat64) return load(0.);
  if (dtype == kFloat16) return f16_to_float(load(std::uint16_t{}));
  if (dtype == kBFloat16) return bf16_to_float(load(std::uint16_t{}));
  if (dtype == kBool) return load(std::uint8_t{}) != 0 ? 1 : 0;
  if (dtype == kInt32) return load(std::int32_t{});
  if (dtype == kInt64) return static_cast<double>(load(std::int64_t{}));
  throw ValueError("Cannot read elements of " + dtype_name(dtype));
}

void store_element(void* data, std::int64_t index, DLDataType dtype, double value) {
  const auto store = [&]<class T>(T converted) {
    std::memcpy(static_cast<char*>(data) + index * static_cast<std::int64_t>(sizeof(T)), &converted, sizeof(T));
  };
  if (dtype == kFloat32) return store(static_cast<float>(value));
  if (dtype == kFloat64) return store(value);
  if (dtype == kFloat16) return store(f16_from_double(value));
  if (dtype == kBFloat16) return store(bf16_from_double(value));
  if (dtype == kBool) return store(static_cast<std::uint8_t>(value != 0));
  if (dtype == kInt32) return store(static_cast<std::int32_t>(value));
  if (dtype == kInt64) return store(static_cast<std::int64_t>(value));
  throw ValueError("Cannot write elements of " + dtype_name(dtype));
}

}  // namespace ditattn
