#include "parallel/tokens.hpp"

#include <cstring>

#include "parallel/device_tokens.hpp"

namespace ditattn::parallel {
namespace {

void copy_on_host(const Tensor& to, const Tensor& from) {
  const std::int64_t item = to.dtype().bits / 8;
  const std::int64_t size = to.size(3);
  const bool together = to.stride(2) == size && from.stride(2) == size;
  const std::int64_t runs = together ? 1 : to.size(2);
  const std::int64_t bytes = (together ? to.size(2) : 1) * size * item;
  if (to.numel() == 0) return;
  auto* target = static_cast<char*>(data_pointer(to));
  const auto* source = static_cast<const char*>(data_pointer(from));
  for_each_token(to, [&](std::int64_t batch, std::int64_t token) {
    for (std::int64_t head = 0; head < runs; ++head) {
      std::memcpy(target + offset_of(to, batch, token, head) * item,
                  source + offset_of(from, batch, token, head) * item, static_cast<std::size_t>(bytes));
    }
  });
}

}  // namespace

Range share(std::int64_t total, std::int64_t parts, std::int64_t index) {
  const std::int64_t least = total / parts;
  const std::int64_t more = total % parts;
  const std::int64_t begin = index * least + std::min(index, more);
  return {begin, begin + least + (index < more ? 1 : 0)};
}

Tensor slice(const Tensor& tensor, int dimension, Range range) {
  std::vector<std::int64_t> shape(tensor.shape().begin(), tensor.shape().end());
  const std::vector<std::int64_t> strides(tensor.strides().begin(), tensor.strides().end());
  shape[static_cast<std::size_t>(dimension)] = range.size();
  auto* data = static_cast<char*>(data_pointer(tensor));
  if (tensor.numel() > 0)
    data += range.begin * strides[static_cast<std::size_t>(dimension)] * (tensor.dtype().bits / 8);
  return wrap(data, shape, tensor.dtype(), strides, tensor.device());
}

Tensor token_major(void* data, std::int64_t batch, std::int64_t tokens, std::int64_t heads, std::int64_t size,
                   DLDataType dtype, DLDevice device) {
  return wrap(data, {batch, tokens, heads, size}, dtype, {heads * size, batch * heads * size, size, 1}, device);
}

Tensor token_major_like(const Tensor& tensor, void* data) {
  return token_major(data, tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3), tensor.dtype(),
                     tensor.device());
}

std::int64_t bytes_of(const Tensor& tensor) { return tensor.numel() * (tensor.dtype().bits / 8); }

Tensor lse_as_tokens(const Tensor& lse) {
  return wrap(data_pointer(lse), {lse.size(0), lse.size(2), lse.size(1), 1}, lse.dtype(),
              {lse.stride(0), lse.stride(2), lse.stride(1), 1}, lse.device());
}

Tensor tokens_as_lse(const Tensor& tokens) {
  return wrap(data_pointer(tokens), {tokens.size(0), tokens.size(2), tokens.size(1)}, tokens.dtype(),
              {tokens.stride(0), tokens.stride(2), tokens.stride(1)}, tokens.device());
}

bool is_token_major(const Tensor& tensor) {
  const std::int64_t row = tensor.size(2) * tensor.size(3);
  const auto lies = [&](int dimension, std::int64_t stride) {
    return tensor.size(dimension) == 1 || tensor.stride(dimension) == stride;
  };
  return lies(3, 1) && lies(2, tensor.size(3)) && lies(0, row) && lies(1, tensor.size(0) * row);
}

void copy(std::span<const TokenCopy> copies) {
  if (copies.empty()) return;
  const DLDevice device = copies.front().to.device();
  if (device.device_type != kDLCPU) return device_tokens(device).copy(copies);
  for (const TokenCopy& one : copies) copy_on_host(one.to, one.from);
}

}  // namespace ditattn::parallel
