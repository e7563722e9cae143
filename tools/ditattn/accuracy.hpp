#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "backends/reference/reference.hpp"
#include "tools/ditattn/inputs.hpp"

namespace ditattn::cli {

/// How far an output is from the float64 oracle, over the rows that were compared.
struct Accuracy {
  double rel_l2 = 0;   ///< ‖out − ref‖ / ‖Σ P·|V|‖; infinite where the denominator alone is zero
  double max_abs = 0;  ///< largest |out − ref|
  double cosine = 1;   ///< between out and ref; 1 where both are zero
  /// Elements that are NaN or infinite where the oracle's are not, or differently; with any, the rest is NaN.
  std::int64_t wrong_non_finite = 0;
  std::int64_t nonzero_without_keys = 0;  ///< elements that are not zero in rows that see no key
};

/// The float64 answer to one problem: computed when first asked for, once per causal alignment.
class Oracle {
 public:
  /// Compares the whole output where that is at most 2³⁰ multiply-adds, else a sample of rows drawn with `seed`, one
  /// from each of as many equal stretches of the output.
  Oracle(Inputs inputs, const ImplConfig& config, const Problem& problem, std::uint64_t seed);

  /// The number of rows compared; none: all.
  [[nodiscard]] std::optional<std::int64_t> sample_rows() const;

  /// `out` is contiguous (B, Sq, H, D).
  Accuracy measure(const Tensor& out, CausalAlignment alignment);

  /// The error that rounding allows a backend of this problem's dtype: what the project's tests demand and, of float16
  /// and bfloat16, what is exact relative to the output (`exact_error`): Σ P·|V| may be so much larger that products of
  /// 8 bits would count as exact.
  [[nodiscard]] double error_bound();

 private:
  const reference::Result& answer(CausalAlignment alignment);

  Inputs inputs_;
  Problem problem_;
  double scale_;
  std::vector<reference::Row> rows_;  // empty: all
  std::map<CausalAlignment, reference::Result> answers_;
};

}  // namespace ditattn::cli
