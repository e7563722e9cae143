#include "core/host_rows.hpp"

#include <fmt/format.h>

#include <cstring>

#include "core/cuda_driver.hpp"
#include "core/float_bits.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

template <class T>
T stored(const char* at, std::int64_t index) {
  T value;
  std::memcpy(&value, at + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

}  // namespace

void to_doubles(const char* from, DLDataType dtype, std::int64_t size, double* to) {
  if (dtype == kBFloat16) {
    for (std::int64_t d = 0; d < size; ++d) to[d] = bf16_to_float(stored<std::uint16_t>(from, d));
  } else if (dtype == kFloat16) {
    for (std::int64_t d = 0; d < size; ++d) to[d] = f16_to_float(stored<std::uint16_t>(from, d));
  } else if (dtype == kFloat32) {
    for (std::int64_t d = 0; d < size; ++d) to[d] = stored<float>(from, d);
  } else {
    for (std::int64_t d = 0; d < size; ++d) to[d] = stored<double>(from, d);
  }
}

HostReader::HostReader(DLDevice device) : device_(device) {
  if (device.device_type == kDLCPU) return;
  if (device.device_type != kDLCUDA) {
    throw ValueError(fmt::format("Rows on {} cannot be read. Valid devices are: cpu, cuda", device_name(device)));
  }
  stream_ = current_stream(device);
  if (cuda::is_capturing(device.device_id, stream_)) {
    throw NotImplementedError(
        fmt::format("Nothing can be read while {}'s stream is captured into a graph.", device_name(device)));
  }
}

HostRows HostReader::read(const void* first, std::int64_t step, std::int64_t width, std::int64_t count) {
  const auto* from = static_cast<const char*>(first);
  if (device_.device_type == kDLCPU || width == 0 || count == 0) return {.first = from, .step = step};
  if (count == 1) step = 0;
  const std::int64_t distance = step < 0 ? -step : step;
  const char* lowest = step < 0 ? from + (count - 1) * step : from;
  // Rows that overlap or touch are one stretch of memory; rows far from each other are packed on the way.
  const bool is_packed = distance > width;
  const std::int64_t step_there = is_packed ? width : distance;
  const std::int64_t bytes = (count - 1) * step_there + width;
  copies_.push_back(empty({bytes}, DLDataType{kDLUInt, 8, 1}));
  char* to = static_cast<char*>(copies_.back().data_ptr());
  if (is_packed) {
    cuda::copy_rows_to_host(to, lowest, static_cast<std::size_t>(distance), static_cast<std::size_t>(width),
                            static_cast<std::size_t>(count), device_.device_id, stream_);
  } else {
    cuda::copy(to, lowest, static_cast<std::size_t>(bytes), device_.device_id, stream_);
  }
  if (step < 0) return {.first = to + (count - 1) * step_there, .step = -step_there};
  return {.first = to, .step = step_there};
}

HostRows HostReader::read_head(const Tensor& tensor, std::int64_t batch, std::int64_t head, std::int64_t first,
                               std::int64_t count) {
  const std::int64_t item = tensor.dtype().bits / 8;
  const std::int64_t at = batch * tensor.stride(0) + first * tensor.stride(1) + head * tensor.stride(2);
  return read(static_cast<const char*>(data_pointer(tensor)) + at * item, tensor.stride(1) * item,
              tensor.size(3) * item, count);
}

void HostReader::wait() const {
  if (!copies_.empty()) cuda::wait_for(device_.device_id, stream_);
}

}  // namespace ditattn
