#pragma once

/// Attention of a few rows of one call in float64, and how far the call's output is from it: for what checks calls
/// while a model runs (the tuner, the guard). Tests have an oracle of their own, which shares nothing with the library
/// (backends/reference).

#include <cstdint>
#include <span>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/export.hpp"

namespace ditattn {

/// One row of an output (B, Sq, H, D); Sq counts joint tokens, in joined order.
struct Row {
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::int64_t query = 0;

  friend bool operator==(const Row&, const Row&) = default;
};

/// The float64 answer of one row.
struct RowAnswer {
  std::vector<double> out;
  std::vector<double> abs;  ///< Σ P·|V|: what rounding errors are relative to at worst
  bool sees_keys = false;
  double random_sum = 0;  ///< √Σ P²·‖V‖²: the length of `out` if the values' signs were random
  double logit_size = 0;  ///< the largest scale·‖q‖·‖k‖ or logit, masks included: float32 rounds logits in proportion
};

/// How far an output is from the answer, over the elements of the rows compared. The norms leave out what is not
/// finite in the answer or in the output.
struct RowErrors {
  double rel_l2 = 0;  ///< ‖out − answer‖ / ‖answer‖; 0 where both are zero, infinite where only the answer is
  double rel_l2_abs = 0;                  ///< the same over ‖Σ P·|V|‖: as `ditattn compare` has it
  double max_abs = 0;                     ///< the largest |out − answer|
  std::int64_t wrong_non_finite = 0;      ///< elements that are finite in one of the two alone
  std::int64_t nonzero_without_keys = 0;  ///< elements that are not zero in rows that see no key
  std::int64_t rows = 0;

  /// The largest of one row: ‖out − answer‖ over ‖answer‖, or over what that would be by size where it is smaller by
  /// chance: `random_sum`, and the dtype's smallest normal number in every element. Infinite where one of
  /// the two counts above counts.
  double worst_row = 0;
  Row worst = {};
  double logit_size = 0;  ///< the largest that is finite
};

/// Float64 attention of `rows` of a checked call whose tensors are float64, float32, float16 or bfloat16, on the CPU or
/// a CUDA device: of the latter the rows' own Q, and the K and V of their heads, are copied to the host, which waits
/// for this thread's stream (NotImplementedError while that is captured). Each K/V head is read once. Hidden keys are
/// skipped: what stands there never shows. ValueError for a row or dtype that there is not.
DITATTN_API std::vector<RowAnswer> answer_rows(const AttentionCall& call, double softmax_scale, bool causal,
                                               CausalAlignment alignment, std::span<const Row> rows);

/// How far `call.out` is from the answers to these rows.
DITATTN_API RowErrors compare_rows(const AttentionCall& call, std::span<const Row> rows,
                                   std::span<const RowAnswer> answers);

/// Both at once.
DITATTN_API RowErrors check_rows(const AttentionCall& call, double softmax_scale, bool causal,
                                 CausalAlignment alignment, std::span<const Row> rows);

/// `count` different rows, all if there are fewer: spread evenly over the positions, the first and the last among them
/// (where `count` is two at least), and over heads and batch entries, in an order that depends on `seed`.
DITATTN_API std::vector<Row> sample_rows(const Problem& problem, std::int64_t count, std::uint64_t seed);

}  // namespace ditattn
