#pragma once

/// Elements of any type as doubles. Written from the formats' definitions, not with the kernels' conversions.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu::testing {

/// Bits to value and back; `encode` cuts off what does not fit. `boolean`: not 0, and 0 or 1.
double decode(ElementType type, std::uint32_t bits);
std::uint32_t encode(ElementType type, double value);

/// The element at `data`, an array of `type`.
double read_element(const void* data, ElementType type, std::int64_t index);

/// An array of its own size and no more, so that sanitizers see what is read past it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(ElementType type, std::int64_t size, double value);

  [[nodiscard]] double get(std::int64_t index) const { return read_element(bytes_.data(), type_, index); }
  void set(std::int64_t index, double value) { set_bits(index, encode(type_, value)); }
  void set_bits(std::int64_t index, std::uint32_t bits);

  [[nodiscard]] std::int64_t size() const { return size_; }
  [[nodiscard]] void* data() { return bytes_.data(); }
  bool operator==(const Buffer&) const = default;

 private:
  ElementType type_ = ElementType::float32;
  std::int64_t size_ = 0;
  std::vector<std::byte> bytes_;
};

}  // namespace ditattn::kernels::cpu::testing
