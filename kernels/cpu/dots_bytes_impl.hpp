/// Products of bytes by a level's `ByteProducts`. Included after it.

#include "kernels/cpu/byte_numbers_impl.hpp"

namespace ditattn::kernels::cpu {
namespace {

/// As dots_float.hpp has them.
struct Dots : ByteNumbers {
  static constexpr int kKeyMost = ByteProducts::kUnsignedMost / 2;
  static constexpr int kKeyOffset = kKeyMost + 1;  ///< K is the unsigned side of Q · Kᵀ
  static constexpr int kProbabilityMost = ByteProducts::kUnsignedMost;

  struct Logits : Terms {
    static Sums add(Vec key, Vec query, Sums sums) { return ByteProducts::add(key, query, sums); }
  };
  struct Values : Terms {
    static Sums add(Vec value, Vec p, Sums sums) { return ByteProducts::add(p, value, sums); }
  };
};

}  // namespace
}  // namespace ditattn::kernels::cpu
