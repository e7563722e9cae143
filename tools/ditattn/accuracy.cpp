#include "tools/ditattn/accuracy.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace ditattn::cli {
namespace {

constexpr double kMaxWork = 1 << 30;   // multiply-adds of one product; about a second of the oracle's time
constexpr std::int64_t kMinKeys = 64;  // with fewer keys, memory for the answer is what limits the rows

// Row `index` of all rows in (batch, head, query) order.
reference::Row row_at(std::int64_t index, const Tensor& query) {
  const std::int64_t seq_q = query.size(1);
  const std::int64_t heads = query.size(2);
  return {.batch = index / seq_q / heads, .head = index / seq_q % heads, .query = index % seq_q};
}

std::vector<reference::Row> sample(const Inputs& inputs, std::uint64_t seed) {
  const std::int64_t total = inputs.query.size(0) * inputs.query.size(1) * inputs.query.size(2);
  const double work_per_row =
      static_cast<double>(std::max(inputs.key.size(1), kMinKeys)) * static_cast<double>(inputs.key.size(3));
  if (static_cast<double>(total) * work_per_row <= kMaxWork) return {};
  const auto count = std::clamp<std::int64_t>(static_cast<std::int64_t>(kMaxWork / work_per_row), 1, total);
  std::mt19937_64 generator(seed);
  std::vector<reference::Row> rows;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t begin = i * (total / count) + std::min(i, total % count);
    const std::int64_t length = total / count + (i < total % count ? 1 : 0);
    const auto offset = static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(length));
    rows.push_back(row_at(begin + offset, inputs.query));
  }
  return rows;
}

// Largest length of a vector over the last dimension.
double largest_norm(const Tensor& tensor) {
  const std::int64_t size = tensor.size(-1);
  const void* data = data_pointer(tensor);
  double largest = 0;
  for (std::int64_t row = 0; row < tensor.numel() / std::max<std::int64_t>(size, 1); ++row) {
    double squares = 0;
    for (std::int64_t d = 0; d < size; ++d) {
      const double x = load_element(data, row * size + d, tensor.dtype());
      squares += x * x;
    }
    largest = std::max(largest, std::sqrt(squares));
  }
  return largest;
}

// Sums over the elements compared.
class Comparer {
 public:
  void add(double out, double expected, double magnitude, bool sees_keys) {
    if (!sees_keys && out != 0) ++accuracy_.nonzero_without_keys;
    if (!std::isfinite(out) || !std::isfinite(expected)) {
      const bool same = std::isnan(out) ? std::isnan(expected) : out == expected;
      accuracy_.wrong_non_finite += same ? 0 : 1;
      return;
    }
    const double difference = out - expected;
    accuracy_.max_abs = std::max(accuracy_.max_abs, std::abs(difference));
    differences_ += difference * difference;
    magnitudes_ += magnitude * magnitude;
    products_ += out * expected;
    outs_ += out * out;
    expecteds_ += expected * expected;
  }

  [[nodiscard]] Accuracy result() const {
    Accuracy accuracy = accuracy_;
    if (accuracy.wrong_non_finite > 0) {
      accuracy.rel_l2 = accuracy.max_abs = accuracy.cosine = std::numeric_limits<double>::quiet_NaN();
      return accuracy;
    }
    if (differences_ > 0) accuracy.rel_l2 = std::sqrt(differences_ / magnitudes_);
    if (outs_ > 0 || expecteds_ > 0) accuracy.cosine = products_ / std::sqrt(outs_) / std::sqrt(expecteds_);
    return accuracy;
  }

 private:
  Accuracy accuracy_;
  double differences_ = 0;
  double magnitudes_ = 0;
  double products_ = 0;
  double outs_ = 0;
  double expecteds_ = 0;
};

}  // namespace

Oracle::Oracle(const Inputs& inputs, const ImplConfig& config, std::uint64_t seed)
    : inputs_(inputs),
      scale_(config.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(config.head_size)))),
      causal_(config.causal),
      rows_(sample(inputs, seed)) {}

std::optional<std::int64_t> Oracle::sample_rows() const {
  return rows_.empty() ? std::nullopt : std::optional(static_cast<std::int64_t>(rows_.size()));
}

const reference::Result& Oracle::answer(CausalAlignment alignment) {
  // Without causal, or with as many queries as keys, both alignments are one.
  if (!causal_ || inputs_.query.size(1) == inputs_.key.size(1)) alignment = CausalAlignment::top_left;
  const auto known = answers_.find(alignment);
  if (known != answers_.end()) return known->second;
  return answers_
      .emplace(alignment, reference::attention(inputs_.query, inputs_.key, inputs_.value, inputs_.metadata, scale_,
                                               causal_, alignment, rows_))
      .first->second;
}

Accuracy Oracle::measure(const Tensor& out, CausalAlignment alignment) {
  const reference::Result& expected = answer(alignment);
  const std::int64_t seq_q = out.size(1);
  const std::int64_t heads = out.size(2);
  const std::int64_t size = out.size(3);
  const std::int64_t count = rows_.empty() ? out.size(0) * seq_q * heads : static_cast<std::int64_t>(rows_.size());
  Comparer comparer;
  for (std::int64_t r = 0; r < count; ++r) {
    const reference::Row row = rows_.empty() ? row_at(r, out) : rows_[static_cast<std::size_t>(r)];
    const std::int64_t begin = ((row.batch * seq_q + row.query) * heads + row.head) * size;
    const bool sees_keys = expected.lse[static_cast<std::size_t>(r)] != -std::numeric_limits<double>::infinity();
    for (std::int64_t d = 0; d < size; ++d) {
      const auto at = static_cast<std::size_t>(r * size + d);
      comparer.add(load_element(data_pointer(out), begin + d, out.dtype()), expected.out[at], expected.abs[at],
                   sees_keys);
    }
  }
  return comparer.result();
}

double Oracle::error_bound() const {
  const DLDataType dtype = inputs_.query.dtype();
  const bool is_large = inputs_.query.numel() >= 1000;
  if (dtype == kBFloat16) return is_large ? 2.5e-3 : 4e-3;
  if (dtype == kFloat16) return is_large ? 3.5e-4 : 6e-4;
  // Rounding errors of float32 logits grow with the logits.
  return 2e-6 * std::max(1.0, largest_norm(inputs_.query) * largest_norm(inputs_.key) * std::abs(scale_) / 32);
}

}  // namespace ditattn::cli
