#pragma once

/// Random problems over all metadata, and their results held against the float64 oracle.

#include <ditattn/ditattn.hpp>

#include <random>
#include <span>
#include <string>
#include <vector>

#include "backends/reference/reference.hpp"

namespace ditattn::conformance {

/// Decisions and values from a seed. A fuzzer's `decisions` (a byte each, two for a number of more values) go first:
/// what it changes in them changes one thing of the problem.
class Draw {
 public:
  explicit Draw(std::uint64_t seed, std::span<const std::uint8_t> decisions = {})
      : generator_(seed), decisions_(decisions) {}
  std::int64_t number(std::int64_t low, std::int64_t high) {
    if (!decisions_.empty()) {
      const std::int64_t more = high - low > 255 ? next_decision() : 0;
      return low + (more * 256 + next_decision()) % (high - low + 1);
    }
    return std::uniform_int_distribution<std::int64_t>(low, high)(generator_);
  }
  bool chance(double p) {
    if (!decisions_.empty()) return static_cast<double>(next_decision()) < p * 256;
    return std::bernoulli_distribution(p)(generator_);
  }
  std::int64_t one_of(const std::vector<std::int64_t>& values) {
    return values[static_cast<std::size_t>(number(0, static_cast<std::int64_t>(values.size()) - 1))];
  }
  Tensor normal(std::initializer_list<std::int64_t> shape, DLDataType dtype);

 private:
  std::int64_t next_decision() {
    if (decisions_.empty()) return 0;
    const std::uint8_t decision = decisions_.front();
    decisions_ = decisions_.subspan(1);
    return decision;
  }

  std::mt19937_64 generator_;
  std::span<const std::uint8_t> decisions_;
};

struct Drawn {
  ImplConfig config;
  Tensor query, key, value;
  AttentionMetadata metadata;
  std::int64_t rows = 0;  ///< joined
  std::string text;
};

/// The most tokens that are drawn; image tokens are one at least.
struct Limits {
  std::int64_t queries = 200;
  std::int64_t keys = 300;
  std::int64_t joint_queries = 40;
  std::int64_t joint_keys = 150;
};

/// Shapes, dtypes and metadata at random, of those that `can` has; tensors are contiguous.
Drawn draw_problem(std::uint64_t seed, const Capabilities& can, const Limits& limits = {},
                   std::span<const std::uint8_t> decisions = {});

/// Puts NaN and infinity into K and V where no row looks: behind the valid prefix and where a padding mask hides keys.
void poison(const Drawn& drawn);

/// Sorted cut points of [0, total], `parts` + 1 of them, empty parts included.
std::vector<std::int64_t> draw_cuts(Draw& draw, std::int64_t total, std::int64_t parts);

/// Largest |q|·|k|·|scale| of what is finite: logits of that size lose their last digits in float32.
double logit_size(const Drawn& drawn, double scale);

/// The bound of an exact back end's error.
double bound_for(const Drawn& drawn, const Tensor& out, double scale);

struct Errors {
  double out = 0;           ///< ‖out − ref‖ / ‖Σ P·|V|‖
  double lse = 0;           ///< the largest
  double result_share = 1;  ///< ‖ref‖ / ‖Σ P·|V|‖, or that of √Σ P²·V² where it is more
};

/// `out` and `lse` contiguous. Rows without keys must be exactly zero and −∞, or the test fails.
Errors errors_of(const Tensor& out, const Tensor& lse, const reference::Result& expected);

}  // namespace ditattn::conformance
