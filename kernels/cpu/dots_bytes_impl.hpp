/// Products of bytes, four to a unit, by a level's `ByteProducts`. Included after it.

namespace ditattn::kernels::cpu {
namespace {

/// As dots_float.hpp has them.
struct Dots {
  static constexpr int kPack = 4;
  static constexpr int kKeyMost = ByteProducts::kUnsignedMost / 2;
  static constexpr int kKeyOffset = kKeyMost + 1;  ///< K is the unsigned side of Q · Kᵀ
  static constexpr int kProbabilityMost = ByteProducts::kUnsignedMost;

  using Sums = Simd::Ints;
  static Sums zero() { return Simd::zero_ints(); }
  static Sums start(const float* sums) { return Simd::load_ints(sums); }
  static void store_start(float* at, Vec whole_numbers) { Simd::store(at, Simd::bits(Simd::to_ints(whole_numbers))); }
  static Vec to_floats(Sums sums) { return Simd::to_floats(sums); }
  static Sums add_logits(Vec key, Vec query, Sums sums) { return ByteProducts::add(key, query, sums); }
  static Sums add_values(Vec value, Vec p, Sums sums) { return ByteProducts::add(p, value, sums); }

  static Vec join(const Vec (&x)[kPack]) {
    const Simd::Ints numbers[kPack] = {Simd::to_ints(x[0]), Simd::to_ints(x[1]), Simd::to_ints(x[2]),
                                       Simd::to_ints(x[3])};
    return Simd::join_bytes(numbers);
  }
  static void store_row(float* units, std::int64_t first, Vec x) {
    Simd::store_bytes(reinterpret_cast<char*>(units) + first, Simd::to_ints(x));
  }
};

}  // namespace
}  // namespace ditattn::kernels::cpu
