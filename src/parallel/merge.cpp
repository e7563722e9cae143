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

struct FromFloat32 {
  using Stored = float;
  static float load(float value) { return value; }
};
struct FromFloat16 {
  using Stored = std::uint16_t;
  static float load(std::uint16_t bits) { return f16_to_float(bits); }
};
struct FromBFloat16 {
  using Stored = std::uint16_t;
  static float load(std::uint16_t bits) { return bf16_to_float(bits); }
};

template <class From>
void merge_rows(const Tensor& out, const Tensor& lse, const Tensor& part_out, const Tensor& part_lse) {
  auto* whole = static_cast<float*>(data_pointer(out));
  auto* sums = static_cast<float*>(data_pointer(lse));
  const auto* part = static_cast<const typename From::Stored*>(data_pointer(part_out));
  const auto* part_sums = static_cast<const float*>(data_pointer(part_lse));
  const std::int64_t heads = out.size(2);
  const std::int64_t size = out.size(3);
  for_each_token(out, [&](std::int64_t batch, std::int64_t token) {
    for (std::int64_t head = 0; head < heads; ++head) {
      float& sum = sums[offset_of(lse, batch, token, head)];
      const Weights weights = weights_of(sum, part_sums[offset_of(part_lse, batch, token, head)]);
      sum = weights.lse;
      if (weights.part == 0) continue;  // of infinitely less weight: what stands there does not count
      float* row = whole + offset_of(out, batch, token, head);
      const auto* other = part + offset_of(part_out, batch, token, head);
      if (weights.whole == 0) {
        for (std::int64_t d = 0; d < size; ++d) row[d] = From::load(other[d]);
      } else {
        for (std::int64_t d = 0; d < size; ++d) row[d] = weights.whole * row[d] + weights.part * From::load(other[d]);
      }
    }
  });
}

template <class To>
void convert_rows(const Tensor& to, const Tensor& from, const To& round) {
  auto* target = static_cast<std::uint16_t*>(data_pointer(to));
  const auto* source = static_cast<const float*>(data_pointer(from));
  for_each_token(to, [&](std::int64_t batch, std::int64_t token) {
    for (std::int64_t head = 0; head < to.size(2); ++head) {
      auto* row = target + offset_of(to, batch, token, head);
      const auto* other = source + offset_of(from, batch, token, head);
      for (std::int64_t d = 0; d < to.size(3); ++d) row[d] = round(other[d]);
    }
  });
}

}  // namespace

void merge(const Tensor& out, const Tensor& lse, const Tensor& part_out, const Tensor& part_lse) {
  if (const DLDevice device = out.device(); device.device_type != kDLCPU) {
    return device_tokens(device).merge(out, lse, part_out, part_lse);
  }
  if (part_out.dtype() == kFloat16) return merge_rows<FromFloat16>(out, lse, part_out, part_lse);
  if (part_out.dtype() == kBFloat16) return merge_rows<FromBFloat16>(out, lse, part_out, part_lse);
  merge_rows<FromFloat32>(out, lse, part_out, part_lse);
}

void clear(const Tensor& out, const Tensor& lse) {
  if (const DLDevice device = out.device(); device.device_type != kDLCPU) return device_tokens(device).clear(out, lse);
  auto* rows = static_cast<float*>(data_pointer(out));
  auto* sums = static_cast<float*>(data_pointer(lse));
  for_each_token(out, [&](std::int64_t batch, std::int64_t token) {
    for (std::int64_t head = 0; head < out.size(2); ++head) {
      std::fill_n(rows + offset_of(out, batch, token, head), out.size(3), 0.F);
      sums[offset_of(lse, batch, token, head)] = -kInfinity;
    }
  });
}

void convert(const Tensor& to, const Tensor& from) {
  if (const DLDevice device = to.device(); device.device_type != kDLCPU) return device_tokens(device).convert(to, from);
  if (to.dtype() == kFloat16) return convert_rows(to, from, f16_from_float);
  if (to.dtype() == kBFloat16) return convert_rows(to, from, bf16_from_float);
  copy(to, from);
}

}  // namespace ditattn::parallel
