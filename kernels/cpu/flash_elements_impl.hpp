/// Rows of any element type as float32. Included by one translation unit per level, after its simd_*.hpp.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu {
namespace {

using Vec = Simd::Vec;
constexpr float kInfinity = __builtin_inff();

std::int64_t element_bytes(ElementType type) {
  return type == ElementType::float32 ? 4 : type == ElementType::boolean ? 1 : 2;
}

const char* element_pointer(const void* base, ElementType type, std::int64_t index) {
  return static_cast<const char*>(base) + index * element_bytes(type);
}

Vec load_elements(const void* p, ElementType type) {
  if (type == ElementType::float32) return Simd::load(static_cast<const float*>(p));
  const auto* halves = static_cast<const std::uint16_t*>(p);
  return type == ElementType::float16 ? Simd::load_f16(halves) : Simd::load_bf16(halves);
}

// Widens one row of `count` elements to float32; the destination has room for a whole vector at least. Returns 0 per
// lane, NaN where an element was NaN or infinite.
Vec widen_row(const char* source, ElementType type, std::int64_t count, float* destination) {
  const Vec zero = Simd::set1(0);
  Vec finite = zero;
  const auto widen = [&](std::int64_t i) {
    const Vec x = load_elements(source + i * element_bytes(type), type);
    Simd::store(destination + i, x);
    finite = Simd::fma(x, zero, finite);
  };
  if (count < Simd::kWidth) {
    alignas(64) char padded[Simd::kWidth * 4] = {};
    std::memcpy(padded, source, static_cast<std::size_t>(count * element_bytes(type)));
    source = padded;
    widen(0);
    return finite;
  }
  for (std::int64_t i = 0; i + Simd::kWidth <= count; i += Simd::kWidth) widen(i);
  if (count % Simd::kWidth != 0) widen(count - Simd::kWidth);  // again in part: cheaper than a copy to pad
  return finite;
}

float load_mask_element(const void* mask, ElementType type, std::int64_t index) {
  const char* p = element_pointer(mask, type, index);
  if (type == ElementType::boolean) return *p != 0 ? 0 : -kInfinity;
  alignas(64) char padded[Simd::kWidth * 4] = {};
  alignas(64) float wide[Simd::kWidth];
  std::memcpy(padded, p, static_cast<std::size_t>(element_bytes(type)));
  Simd::store(wide, load_elements(padded, type));
  return wide[0];
}

}  // namespace
}  // namespace ditattn::kernels::cpu
