#pragma once

/// The two loops that take a row's time, in float64.

#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>

namespace ditattn {

/// Partial sums that go side by side, so that the compiler can use vectors.
inline constexpr std::int64_t kLanes = 8;

/// `size` is a multiple of kLanes.
inline double dot(const double* a, const double* b, std::int64_t size) {
  std::array<double, kLanes> sums{};
  for (std::int64_t d = 0; d < size; d += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[d + lane] * b[d + lane];
  }
  return std::accumulate(sums.begin(), sums.end(), 0.);
}

/// A key's values, and what they count.
struct Weighted {
  double weight;
  const double* values;
};

/// Adds the weighted values to `out`, and their magnitudes to `abs`. `size` is a multiple of kLanes.
inline void add_weighted(std::span<const Weighted> keys, std::int64_t size, double* out, double* abs) {
  for (std::int64_t d = 0; d < size; d += kLanes) {
    std::array<double, kLanes> sums{};
    std::array<double, kLanes> magnitudes{};
    for (const Weighted& key : keys) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        const double product = key.weight * key.values[d + lane];
        sums[lane] += product;
        magnitudes[lane] += std::abs(product);
      }
    }
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      out[d + lane] += sums[lane];
      abs[d + lane] += magnitudes[lane];
    }
  }
}

}  // namespace ditattn
