#include "tests/kernels/buffer.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace ditattn::kernels::cpu::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

std::size_t bytes_of(ElementType type) {
  return type == ElementType::float32 ? 4 : type == ElementType::boolean ? 1 : 2;
}

}  // namespace

double decode(ElementType type, std::uint32_t bits) {
  switch (type) {
    case ElementType::boolean:
      return bits != 0 ? 1 : 0;
    case ElementType::float32:
      return std::bit_cast<float>(bits);
    case ElementType::bfloat16:
      return std::bit_cast<float>(bits << 16);
    case ElementType::float16:
      break;
  }
  const double sign = (bits & 0x8000U) != 0 ? -1 : 1;
  const int exponent = static_cast<int>(bits >> 10 & 31U);
  const int mantissa = static_cast<int>(bits & 1023U);
  if (exponent == 31) return mantissa == 0 ? sign * kInf : std::numeric_limits<double>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

std::uint32_t encode(ElementType type, double value) {
  if (type == ElementType::boolean) return value != 0 ? 1 : 0;
  const auto single = std::bit_cast<std::uint32_t>(static_cast<float>(value));
  if (type == ElementType::float32) return single;
  if (type == ElementType::bfloat16) return single >> 16;
  const std::uint32_t sign = std::signbit(value) ? 0x8000U : 0;
  if (std::isnan(value)) return 0x7E00U;
  if (std::isinf(value)) return sign | 0x7C00U;
  const double magnitude = std::fabs(value);
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const auto mantissa = static_cast<std::uint32_t>(std::ldexp(magnitude, 10 - exponent));  // 1024 to 2047 if normal
  return sign | ((static_cast<std::uint32_t>(exponent + 14) << 10) + mantissa);
}

double read_element(const void* data, ElementType type, std::int64_t index) {
  const std::size_t bytes = bytes_of(type);
  std::uint32_t bits = 0;
  std::memcpy(&bits, static_cast<const std::byte*>(data) + static_cast<std::size_t>(index) * bytes, bytes);
  return decode(type, bits);
}

Buffer::Buffer(ElementType type, std::int64_t size, double value)
    : type_(type), size_(size), bytes_(static_cast<std::size_t>(size) * bytes_of(type)) {
  for (std::int64_t i = 0; i < size; ++i) set(i, value);
}

void Buffer::set_bits(std::int64_t index, std::uint32_t bits) {
  const std::size_t bytes = bytes_of(type_);
  std::memcpy(bytes_.data() + static_cast<std::size_t>(index) * bytes, &bits, bytes);
}

}  // namespace ditattn::kernels::cpu::testing
