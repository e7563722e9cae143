/// kernels/nvfp4.hpp for vectors: the same results. Included after block_rows_impl.hpp.

#include <cstdint>

#include "kernels/sage3.hpp"

namespace ditattn::kernels::cpu {
namespace {

Vec at_most(Vec x, float most) { return Simd::select_less(x, Simd::set1(most), x, Simd::set1(most)); }

// The nearest e2m1, ties to even, for |x| ≤ 448. What is added moves the last mantissa bit to float32's last.
Vec round_e2m1(Vec x) {
  const Vec leading = Simd::leading_power(Simd::max(absolute(x), Simd::set1(1)));
  const Vec move = Simd::mul(leading, Simd::set1(1.5F * (1 << 22)));
  const Vec rounded = at_most(Simd::sub(Simd::add(x, move), move), E2m1::kMost);
  return Simd::max(rounded, Simd::set1(-E2m1::kMost));
}

// The nearest e4m3, ties to even, for x ≥ 0.
Vec round_e4m3(Vec x) {
  const Vec leading = Simd::leading_power(Simd::max(at_most(x, E4m3::kMost), Simd::set1(1.F / 64)));
  const Vec move = Simd::mul(leading, Simd::set1(1 << 20));
  return at_most(Simd::sub(Simd::add(x, move), move), E4m3::kMost);
}

// The float32 scale of numbers of which the largest is `largest`; 0 where they count as zeros.
Vec tensor_scale(Vec largest) {
  const Vec least = Simd::set1(kSage3LeastNumber);
  return Simd::select_less(least, largest, Simd::div(largest, Simd::set1(kSage3ProbabilityMost)), Simd::set1(0));
}

// A group's scale, as a number of e4m3, and what numbers of the group are multiplied by to be rounded.
struct GroupScale {
  Vec number;
  Vec inverse;

  GroupScale(Vec largest, Vec scale) {
    const Vec zero = Simd::set1(0);
    number = Simd::div(Simd::div(largest, Simd::set1(E2m1::kMost)), scale);
    number = Simd::select_less(zero, scale, round_e4m3(number), zero);
    inverse = Simd::div(Simd::set1(1), Simd::mul(number, scale));
    inverse = Simd::select_equal(number, zero, zero, inverse);
  }
  /// x in units of the float32 scale.
  [[nodiscard]] Vec apply(Vec x) const { return Simd::mul(round_e2m1(Simd::mul(x, inverse)), number); }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
