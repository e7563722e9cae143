/// Rows of any element type as float32. Included after a simd_*.hpp.

#include <cstdint>
#include <cstring>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu {
namespace {

using Vec = Simd::Vec;
constexpr float kInfinity = __builtin_inff();
constexpr int kLanes = Simd::kWidth * Simd::kVectors;  // query rows of one panel

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

const char* element_pointer(const void* base, ElementType type, std::int64_t index) {
  return static_cast<const char*>(base) + index * element_bytes(type);
}

// Rows ahead that are asked for: rows of one head lie far apart, which no hardware prefetcher follows, and each may
// need a page walk.
constexpr int kRowsAhead = 12;

// Asks for a row of `bytes` that will be read soon.
void prefetch_row(const char* row, std::int64_t bytes) {
  for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  __builtin_prefetch(row + bytes - 1, 0, 2);
}

template <ElementType type>
Vec load_elements(const char* p) {
  if constexpr (type == ElementType::float32) return Simd::load(reinterpret_cast<const float*>(p));
  const auto* halves = reinterpret_cast<const std::uint16_t*>(p);
  return type == ElementType::float16 ? Simd::load_f16(halves) : Simd::load_bf16(halves);
}

// Widens one row of `count` elements to float32; the destination has room for a whole vector at least. Returns 0 per
// lane, NaN where an element was NaN or infinite.
template <ElementType type>
Vec widen_row(const char* source, std::int64_t count, float* destination) {
  constexpr std::int64_t bytes = type == ElementType::float32 ? 4 : 2;
  const Vec zero = Simd::set1(0);
  Vec finite = zero;
  const auto widen = [&](std::int64_t i) {
    const Vec x = load_elements<type>(source + i * bytes);
    Simd::store(destination + i, x);
    finite = Simd::fma(x, zero, finite);
  };
  if (count < Simd::kWidth) {
    alignas(64) char padded[Simd::kWidth * 4] = {};
    std::memcpy(padded, source, static_cast<std::size_t>(count * bytes));
    source = padded;
    widen(0);
    return finite;
  }
  for (std::int64_t i = 0; i + Simd::kWidth <= count; i += Simd::kWidth) widen(i);
  if (count % Simd::kWidth != 0) widen(count - Simd::kWidth);  // again in part: cheaper than a copy to pad
  return finite;
}

Vec widen_row(const char* source, ElementType type, std::int64_t count, float* destination) {
  if (type == ElementType::float32) return widen_row<ElementType::float32>(source, count, destination);
  if (type == ElementType::float16) return widen_row<ElementType::float16>(source, count, destination);
  return widen_row<ElementType::bfloat16>(source, count, destination);
}

float load_mask_element(const void* mask, ElementType type, std::int64_t index) {
  const char* p = element_pointer(mask, type, index);
  if (type == ElementType::boolean) return *p != 0 ? 0 : -kInfinity;
  alignas(64) float wide[Simd::kWidth];
  widen_row(p, type, 1, wide);
  return wide[0];
}

struct Exp2Long {
  /// 2^r for r from 0 to 1, least relative error among degree 5 with p(0) = 1: 8.2e-8, 1.4e-7 with rounding.
  static Vec exp2_fraction(Vec r) {
    Vec p = Simd::set1(0.0018669526F);
    p = Simd::fma(p, r, Simd::set1(0.009017481F));
    p = Simd::fma(p, r, Simd::set1(0.055799514F));
    p = Simd::fma(p, r, Simd::set1(0.2401646F));
    p = Simd::fma(p, r, Simd::set1(0.6931513F));
    return Simd::fma(p, r, Simd::set1(1));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
