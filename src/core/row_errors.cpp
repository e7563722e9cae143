// How far an output is from the float64 answer, and which rows to look at.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "core/host_rows.hpp"
#include "core/row_reference.hpp"

namespace ditattn {
namespace {

// The rows of `call.out`, as float64.
std::vector<double> read_out(const AttentionCall& call, std::span<const Row> rows) {
  HostReader reader(call.out.device());
  std::vector<HostRows> memory;
  for (const Row& row : rows) memory.push_back(reader.read_head(call.out, row.batch, row.head, row.query, 1));
  reader.wait();
  const std::int64_t size = call.out.size(3);
  std::vector<double> out(rows.size() * static_cast<std::size_t>(size));
  for (std::size_t r = 0; r < rows.size(); ++r) {
    to_doubles(memory[r].first, call.out.dtype(), size, out.data() + r * static_cast<std::size_t>(size));
  }
  return out;
}

// Of one row, or of several together.
struct Squares {
  double difference = 0;
  double answer = 0;
  double abs = 0;

  Squares& operator+=(const Squares& other) {
    difference += other.difference;
    answer += other.answer;
    abs += other.abs;
    return *this;
  }
};

double ratio(double difference, double reference) { return difference == 0 ? 0 : std::sqrt(difference / reference); }

double smallest_normal(DLDataType dtype) {
  if (dtype == kFloat16) return 0x1p-14;
  return dtype == kFloat64 ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
}

// Adds a row's elements to what is counted.
Squares compare(std::span<const double> out, const RowAnswer& answer, RowErrors& errors) {
  Squares squares;
  for (std::size_t d = 0; d < out.size(); ++d) {
    if (!answer.sees_keys && out[d] != 0) ++errors.nonzero_without_keys;
    if (!std::isfinite(out[d]) || !std::isfinite(answer.out[d])) {
      if (std::isfinite(out[d]) != std::isfinite(answer.out[d])) ++errors.wrong_non_finite;
      continue;
    }
    const double difference = out[d] - answer.out[d];
    errors.max_abs = std::max(errors.max_abs, std::abs(difference));
    squares += {.difference = difference * difference,
                .answer = answer.out[d] * answer.out[d],
                .abs = answer.abs[d] * answer.abs[d]};
  }
  return squares;
}

}  // namespace

RowErrors check_rows(const AttentionCall& call, double softmax_scale, bool causal, CausalAlignment alignment,
                     std::span<const Row> rows) {
  return compare_rows(call, rows, answer_rows(call, softmax_scale, causal, alignment, rows));
}

RowErrors compare_rows(const AttentionCall& call, std::span<const Row> rows, std::span<const RowAnswer> answers) {
  const std::vector<double> out = read_out(call, rows);
  const auto size = static_cast<std::size_t>(call.query.size(3));
  const double normal = smallest_normal(call.out.dtype());
  RowErrors errors{.rows = static_cast<std::int64_t>(rows.size())};
  Squares all;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const RowAnswer& answer = answers[r];
    const std::int64_t wrong_before = errors.wrong_non_finite + errors.nonzero_without_keys;
    const Squares squares = compare({out.data() + r * size, size}, answer, errors);
    all += squares;
    const double random_sum = std::isfinite(answer.random_sum) ? answer.random_sum : 0;
    const double by_size = std::max(random_sum * random_sum, normal * normal * static_cast<double>(size));
    const bool is_wrong = errors.wrong_non_finite + errors.nonzero_without_keys > wrong_before;
    const double error = is_wrong ? std::numeric_limits<double>::infinity()
                                  : ratio(squares.difference, std::max(squares.answer, by_size));
    if (r == 0 || error > errors.worst_row) errors.worst = rows[r];
    errors.worst_row = std::max(errors.worst_row, error);
    if (std::isfinite(answer.logit_size)) errors.logit_size = std::max(errors.logit_size, answer.logit_size);
  }
  errors.rel_l2 = ratio(all.difference, all.answer);
  errors.rel_l2_abs = ratio(all.difference, all.abs);
  return errors;
}

std::vector<Row> sample_rows(const Problem& problem, std::int64_t count, std::uint64_t seed) {
  const std::int64_t planes = problem.batch * problem.num_heads;
  count = std::min(count, planes * problem.seq_q);
  if (count <= 0) return {};
  std::mt19937_64 generator(seed);
  std::vector<std::int64_t> order(static_cast<std::size_t>(planes));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[generator() % (i + 1)]);
  std::vector<Row> rows;
  for (std::int64_t i = 0; i < count; ++i) {
    // One position of each of `count` stretches, the outermost of the outer ones. Where stretches are shorter than a
    // position, neighbours share one, and have heads of their own: there are as many as it takes.
    const std::int64_t begin = i * problem.seq_q / count;
    const std::int64_t length = std::max<std::int64_t>((i + 1) * problem.seq_q / count - begin, 1);
    auto query = begin + static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(length));
    if (count > 1 && i == 0) query = 0;
    if (count > 1 && i == count - 1) query = problem.seq_q - 1;
    const std::int64_t plane = order[static_cast<std::size_t>(i % planes)];
    rows.push_back({.batch = plane / problem.num_heads, .head = plane % problem.num_heads, .query = query});
  }
  return rows;
}

}  // namespace ditattn
