#include "tools/ditattn/accuracy.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <random>
#include <utility>

#include "ditattn/tuner.hpp"

namespace ditattn::cli {
namespace {

constexpr double kMaxWork = 1 << 30;   // multiply-adds of one product; about a second of the oracle's time
constexpr std::int64_t kMinKeys = 64;  // with fewer keys, memory for the answer is what limits the rows

// Row `index` of all rows in (batch, head, query) order.
reference::Row row_at(std::int64_t index, const Problem& problem) {
  const std::int64_t head = index / problem.seq_q;
  return {.batch = head / problem.num_heads, .head = head % problem.num_heads, .query = index % problem.seq_q};
}

std::vector<reference::Row> sample(const Problem& problem, std::uint64_t seed) {
  const std::int64_t total = problem.batch * problem.seq_q * problem.num_heads;
  const double work_per_row =
      static_cast<double>(std::max(problem.seq_kv, kMinKeys)) * static_cast<double>(problem.head_size);
  if (static_cast<double>(total) * work_per_row <= kMaxWork) return {};
  const auto count = std::clamp<std::int64_t>(static_cast<std::int64_t>(kMaxWork / work_per_row), 1, total);
  std::mt19937_64 generator(seed);
  std::vector<reference::Row> rows;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t begin = i * (total / count) + std::min(i, total % count);
    const std::int64_t length = total / count + (i < total % count ? 1 : 0);
    const auto offset = static_cast<std::int64_t>(generator() % static_cast<std::uint64_t>(length));
    rows.push_back(row_at(begin + offset, problem));
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

// The same over a tensor and the joint one beside it, if any.
double largest_norm(const Tensor& tensor, const Inputs& inputs,
                    tvm::ffi::Optional<Tensor> AttentionMetadataFields::*joint) {
  const double image = largest_norm(tensor);
  if (!inputs.metadata.defined() || !(inputs.metadata->fields.*joint).has_value()) return image;
  return std::max(image, largest_norm((inputs.metadata->fields.*joint).value()));
}

// Of what is finite.
double norm(const std::vector<double>& elements) {
  double squares = 0;
  for (const double x : elements) squares += std::isfinite(x) ? x * x : 0;
  return std::sqrt(squares);
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

Oracle::Oracle(Inputs inputs, const ImplConfig& config, const Problem& problem, std::uint64_t seed)
    : inputs_(std::move(inputs)),
      problem_(problem),
      scale_(config.softmax_scale.value_or(1 / std::sqrt(static_cast<double>(config.head_size)))),
      rows_(sample(problem, seed)) {}

std::optional<std::int64_t> Oracle::sample_rows() const {
  return rows_.empty() ? std::nullopt : std::optional(static_cast<std::int64_t>(rows_.size()));
}

const reference::Result& Oracle::answer(CausalAlignment alignment) {
  // Without causal, or with as many queries as keys (in every packed sequence), both alignments are one.
  if (!problem_.causal || (!problem_.packed && problem_.seq_q == problem_.seq_kv))
    alignment = CausalAlignment::top_left;
  const auto known = answers_.find(alignment);
  if (known != answers_.end()) return known->second;
  return answers_
      .emplace(alignment, reference::attention(inputs_.query, inputs_.key, inputs_.value, inputs_.metadata, scale_,
                                               problem_.causal, alignment, rows_))
      .first->second;
}

Accuracy Oracle::measure(const Tensor& out, CausalAlignment alignment) {
  const reference::Result& expected = answer(alignment);
  const std::int64_t seq_q = problem_.seq_q;
  const std::int64_t heads = problem_.num_heads;
  const std::int64_t size = problem_.head_size;
  const std::int64_t count = rows_.empty() ? problem_.batch * seq_q * heads : static_cast<std::int64_t>(rows_.size());
  Comparer comparer;
  for (std::int64_t r = 0; r < count; ++r) {
    const reference::Row row = rows_.empty() ? row_at(r, problem_) : rows_[static_cast<std::size_t>(r)];
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

double Oracle::error_bound() {
  const DLDataType dtype = inputs_.query.dtype();
  const bool is_large = inputs_.query.numel() >= 1000;
  if (dtype != kFloat32) {
    const double tested = dtype == kBFloat16 ? (is_large ? 2.5e-3 : 4e-3) : (is_large ? 3.5e-4 : 6e-4);
    const reference::Result& expected = answer(CausalAlignment::top_left);
    return std::min(tested, exact_error(dtype) * norm(expected.out) / std::max(norm(expected.abs), DBL_MIN));
  }
  const double query = largest_norm(inputs_.query, inputs_, &AttentionMetadataFields::joint_query);
  const double key = largest_norm(inputs_.key, inputs_, &AttentionMetadataFields::joint_key);
  // Rounding errors of float32 logits grow with the logits.
  return 2e-6 * std::max(1.0, query * key * std::abs(scale_) / 32);
}

}  // namespace ditattn::cli
