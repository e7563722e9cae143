#include "parallel/merge.hpp"

#include <cmath>
#include <limits>

#include "core/float_bits.hpp"
#include "parallel/device_tokens.hpp"
#include "parallel/tokens.hpp"

namespace ditattn::parallel {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What each side's row counts for in the whole, and the whole's LSE.
struct Weights {
  float whole;
  float part;
  float lse;
};

Weights weights_of(float whole, float part) {
  if (part == -kInfinity) return {1, 0, whole};
  if (whole == -kInfinity) return {0, 1, part};
  const float largest = std::max(whole, part);
  if (std::isnan(whole) || std::isnan(part) || largest == kInfinity) return {kNan, kNan, kNan};
  const float of_whole = std::exp(whole - largest);
  const float of_part = std::exp(part - largest);
  const float sum = of_whole + of_part;
  return {of_whole / sum, of_part / sum, largest + std::log(sum)};
}

struct Float32 {
  using Stored = float;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};
struct Float16 {
  using Stored = std::uint16_t;
  static float load(std::uint16_t bits) { return f16_to_float(bits); }
  static std::uint16_t store(float value) { return f16_from_float(value); }
};
struct BFloat16 {
  using Stored = std::uint16_t;
  static float load(std::uint16_t bits) { return bf16_to_float(bits); }
  static std::uint16_t store(float value) { return bf16_from_float(value); }
};

template <class Format>
auto* row_of(const Tensor& tensor, std::int64_t batch, std::int64_t token, std::int64_t head) {
  return static_cast<typename Format::Stored*>(data_pointer(tensor)) + offset_of(tensor, batch, token, head);
}

template <class To, class A, class B>
void merge_rows(const Part& to, const Part& a, const Part& b) {
  const std::int64_t size = to.out.size(3);
  for_each_token(to.out, [&](std::int64_t batch, std::int64_t token) {
    for (std::int64_t head = 0; head < to.out.size(2); ++head) {
      const auto lse = [&](const Part& part) -> float& { return *row_of<Float32>(part.lse, batch, token, head); };
      const Weights weights = weights_of(lse(a), lse(b));
      lse(to) = weights.lse;
      auto* sum = row_of<To>(to.out, batch, token, head);
      const auto* x = row_of<A>(a.out, batch, token, head);
      const auto* y = row_of<B>(b.out, batch, token, head);
      for (std::int64_t d = 0; d < size; ++d) {  // of no weight: what stands there does not count
        const float one = weights.whole == 0 ? 0 : weights.whole * A::load(x[d]);
        const float other = weights.part == 0 ? 0 : weights.part * B::load(y[d]);
        sum[d] = To::store(weights.whole == 0 ? other : weights.part == 0 ? one : one + other);
      }
    }
  });
}

// Calls call(Float32), call(Float16) or call(BFloat16).
template <class Call>
void with_format(DLDataType dtype, const Call& call) {
  if (dtype == kFloat16) return call(Float16{});
  if (dtype == kBFloat16) return call(BFloat16{});
  call(Float32{});
}

}  // namespace

void merge(const Part& to, const Part& a, const Part& b) {
  if (const DLDevice device = to.out.device(); device.device_type != kDLCPU) {
    return device_tokens(device).merge(to, a, b);
  }
  with_format(b.out.dtype(), [&]<class B>(B) {
    const auto merge_into = [&]<class To>(To) {
      a.out.dtype() == kFloat32 ? merge_rows<To, Float32, B>(to, a, b) : merge_rows<To, B, B>(to, a, b);
    };
    to.out.dtype() == kFloat32 ? merge_into(Float32{}) : merge_into(B{});
  });
}

void clear(const Part& part) {
  if (const DLDevice device = part.out.device(); device.device_type != kDLCPU) return device_tokens(device).clear(part);
  for_each_token(part.out, [&](std::int64_t batch, std::int64_t token) {
    for (std::int64_t head = 0; head < part.out.size(2); ++head) {
      std::fill_n(row_of<Float32>(part.out, batch, token, head), part.out.size(3), 0.F);
      *row_of<Float32>(part.lse, batch, token, head) = -kInfinity;
    }
  });
}

void convert(const Tensor& to, const Tensor& from) {
  if (const DLDevice device = to.device(); device.device_type != kDLCPU) return device_tokens(device).convert(to, from);
  with_format(to.dtype(), [&]<class To>(To) {
    for_each_token(to, [&](std::int64_t batch, std::int64_t token) {
      for (std::int64_t head = 0; head < to.size(2); ++head) {
        const auto* exact = row_of<Float32>(from, batch, token, head);
        std::transform(exact, exact + to.size(3), row_of<To>(to, batch, token, head), To::store);
      }
    });
  });
}

}  // namespace ditattn::parallel
