#pragma once

/// Attention from AttentionProblem's documented meaning, in double precision, one element after the other.

#include <vector>

#include "kernels/cpu/attention_problem.hpp"

namespace ditattn::kernels::cpu::testing {

/// A row of `head_size` elements.
using Row = std::vector<double>;

/// Keys and rows are counted over all segments.
const KeySegment& segment_of(const AttentionProblem& problem, std::int64_t key);
Row read_row(const AttentionProblem& problem, const void* data, const Strides& strides, std::int64_t batch,
             std::int64_t token, std::int64_t head);
Row read_query(const AttentionProblem& problem, std::int64_t batch, std::int64_t row, std::int64_t head);

/// Whether a query row sees a key, both counted over all segments.
bool sees(const AttentionProblem& problem, std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t key);

/// Elements in the order batch, row, head, head dimension; `lse` in the order batch, row, head.
struct Expected {
  std::vector<double> out;
  std::vector<double> magnitude;  ///< Σ P·|V|: what rounding errors are measured against
  std::vector<double> lse;
};
Expected expected_results(const AttentionProblem& problem);

}  // namespace ditattn::kernels::cpu::testing
