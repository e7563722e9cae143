#pragma once

/// 8-bit numbers, four to a unit, with 32-bit sums. Included after tile_elements_impl.hpp.

namespace ditattn::kernels::cpu {
namespace {

struct ByteNumbers {
  static constexpr int kPack = 4;

  using Sums = Simd::Ints;
  static void store_sums(float* at, Vec whole_numbers) { Simd::store(at, Simd::bits(Simd::to_ints(whole_numbers))); }
  static Vec to_floats(Sums sums) { return Simd::to_floats(sums); }

  static Vec join(const Vec (&x)[kPack]) {
    const Simd::Ints numbers[kPack] = {Simd::to_ints(x[0]), Simd::to_ints(x[1]), Simd::to_ints(x[2]),
                                       Simd::to_ints(x[3])};
    return Simd::join_bytes(numbers);
  }
  static void store_row(float* units, std::int64_t first, Vec x) {
    Simd::store_bytes(reinterpret_cast<char*>(units) + first, Simd::to_ints(x));
  }

  struct Terms {
    using Sums = Simd::Ints;
    static Sums zero() { return Simd::zero_ints(); }
    static Sums load(const float* sums) { return Simd::load_ints(sums); }
  };
};

}  // namespace
}  // namespace ditattn::kernels::cpu
