#pragma once

/// Tensors are tvm-ffi's: reference-counted, DLPack inside, exchanged with PyTorch, NumPy, JAX and others in place.

#include <tvm/ffi/container/tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "ditattn/export.hpp"

namespace ditattn {

/// A reference to a DLPack tensor; copies share memory.
using Tensor = tvm::ffi::Tensor;

inline constexpr DLDataType kFloat64{kDLFloat, 64, 1};    ///< for references
inline constexpr DLDataType kFloat32{kDLFloat, 32, 1};    ///< bits: 1 sign, 8 exponent, 23 fraction
inline constexpr DLDataType kFloat16{kDLFloat, 16, 1};    ///< bits: 1 sign, 5 exponent, 10 fraction
inline constexpr DLDataType kBFloat16{kDLBfloat, 16, 1};  ///< bits: 1 sign, 8 exponent, 7 fraction
inline constexpr DLDataType kInt32{kDLInt, 32, 1};        ///< for cu_seqlens
inline constexpr DLDataType kInt64{kDLInt, 64, 1};        ///< for lengths and offsets
inline constexpr DLDataType kBool{kDLBool, 8, 1};         ///< a byte, 0 or 1; for masks
inline constexpr DLDevice kCpu{kDLCPU, 0};                ///< host memory

/// "float32", "bfloat16", "bool", …
DITATTN_API std::string dtype_name(DLDataType dtype);

/// The inverse of `dtype_name`; also takes the short forms f32, f16, bf16. ValueError names what is allowed.
DITATTN_API DLDataType parse_dtype(std::string_view name);

/// "cpu", "cuda", "rocm", "unknown"; makes no string.
DITATTN_API std::string_view device_type_name(DLDevice device);

/// "cpu", "cuda:0", …
DITATTN_API std::string device_name(DLDevice device);

/// "(1, 4096, 24, 128)"
DITATTN_API std::string shape_name(std::span<const std::int64_t> shape);
/// The same of a tensor.
DITATTN_API std::string shape_name(const Tensor& tensor);

/// A new contiguous tensor in host memory, 64-byte aligned, not initialised. ValueError for a negative or
/// overflowing shape, MemoryError where memory cannot be had.
DITATTN_API Tensor empty(std::span<const std::int64_t> shape, DLDataType dtype);
/// The same for a shape in braces.
inline Tensor empty(std::initializer_list<std::int64_t> shape, DLDataType dtype) {
  return empty(std::span(shape.begin(), shape.size()), dtype);
}

/// The same on any device. On CUDA through the environment's allocator (PyTorch's, in a process that has it), or else
/// from the driver, in the order of this thread's stream (`current_stream`), which must outlive the tensor.
DITATTN_API Tensor empty(std::span<const std::int64_t> shape, DLDataType dtype, DLDevice device);

/// A tensor over memory that the caller keeps alive. `strides` are in elements; empty means contiguous.
DITATTN_API Tensor wrap(void* data, std::span<const std::int64_t> shape, DLDataType dtype,
                        std::span<const std::int64_t> strides = {}, DLDevice device = kCpu);
/// The same for a shape in braces.
inline Tensor wrap(void* data, std::initializer_list<std::int64_t> shape, DLDataType dtype,
                   std::initializer_list<std::int64_t> strides = {}, DLDevice device = kCpu) {
  return wrap(data, std::span(shape.begin(), shape.size()), dtype, std::span(strides.begin(), strides.size()), device);
}

/// First element of `tensor`, byte offset included; null where there is no data.
inline void* data_pointer(const Tensor& tensor) {
  auto* const data = static_cast<char*>(tensor.data_ptr());
  return data == nullptr ? nullptr : data + tensor.byte_offset();
}

/// The largest power of two, in bytes and 16 at most, of which the first element's address and all strides but the last
/// are multiples; 0 where one of them is negative.
DITATTN_API std::int64_t alignment_of(const Tensor& tensor);

/// Element `index` of a host tensor's memory as float64, whatever its dtype (float64, float32, float16, bfloat16,
/// bool, int32, int64). For tests and references: converts one element at a time.
DITATTN_API double load_element(const void* data, std::int64_t index, DLDataType dtype);

/// Writes `value` to element `index`, rounded to nearest even. Same dtypes as `load_element`.
DITATTN_API void store_element(void* data, std::int64_t index, DLDataType dtype, double value);

}  // namespace ditattn
