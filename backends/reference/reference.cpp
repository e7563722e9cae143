#include "backends/reference/reference.hpp"

#include <ditattn/errors.hpp>
#include <ditattn/threads.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <utility>

#include "backends/reference/rules.hpp"

namespace ditattn::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// parallel_for for a lambda.
template <class Body>
void for_each_task(std::int64_t count, Body body) {
  parallel_for(
      count, [](void* context, std::int64_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

// Element (batch, token, head, d) of a tensor (batch, token, head, head size).
double element(const Tensor& tensor, std::int64_t batch, std::int64_t token, std::int64_t head, std::int64_t d) {
  const std::int64_t index =
      batch * tensor.stride(0) + token * tensor.stride(1) + head * tensor.stride(2) + d * tensor.stride(3);
  return load_element(data_pointer(tensor), index, tensor.dtype());
}

// A tensor of image tokens and, where there are some, one of text tokens.
struct Source {
  const Tensor& image;
  Tensor joint;
  [[nodiscard]] double at(const Place& place, std::int64_t batch, std::int64_t head, std::int64_t d) const {
    return element(place.joint ? joint : image, batch, place.index, head, d);
  }
};

// What one K/V head of one batch entry has, in float64. K is transposed so that loops over keys run along memory.
struct Plane {
  Plane(const Rules& rules, const Source& key, const Source& value, std::int64_t batch, std::int64_t head)
      : keys(rules.keys()),
        head_size(key.image.size(3)),
        k_transposed(static_cast<std::size_t>(keys * head_size)),
        v(static_cast<std::size_t>(keys * head_size)) {
    for_each_task(keys, [&](std::int64_t j) {
      const Place place = rules.key_place(j);
      for (std::int64_t d = 0; d < head_size; ++d) {
        k_transposed[d * keys + j] = key.at(place, batch, head, d);
        v[j * head_size + d] = value.at(place, batch, head, d);
      }
    });
  }
  std::int64_t keys;
  std::int64_t head_size;
  std::vector<double> k_transposed;
  std::vector<double> v;
};

// Where the answer of one row goes.
struct Answer {
  double* out;
  double* abs;
  double* random;
  double* lse;
};

// One row: `query` are its D elements; `logits` has room for one number per key.
void attend(const Rules& rules, double scale, const Plane& plane, const Row& row, const double* query, double* logits,
            const Answer& answer) {
  std::fill_n(logits, plane.keys, 0.);
  for (std::int64_t d = 0; d < plane.head_size; ++d) {
    const double* k = plane.k_transposed.data() + d * plane.keys;
    for (std::int64_t j = 0; j < plane.keys; ++j) logits[j] += query[d] * k[j];
  }
  double largest = -kInfinity;
  for (std::int64_t j = 0; j < plane.keys; ++j) {
    const double added =
        rules.sees(row.batch, row.query, j) ? rules.added(row.batch, row.head, row.query, j) : -kInfinity;
    logits[j] = added == -kInfinity ? -kInfinity : scale * logits[j] + added;
    if (!(logits[j] <= largest)) largest = logits[j];
    if (std::isnan(largest)) break;  // a visible NaN: so is the whole row
  }
  *answer.lse = largest;
  for (double* numbers : {answer.out, answer.abs, answer.random}) {
    std::fill_n(numbers, plane.head_size, std::isnan(largest) ? largest : 0.);
  }
  if (largest == -kInfinity || std::isnan(largest)) return;
  double sum = 0;
  for (std::int64_t j = 0; j < plane.keys; ++j) {
    if (logits[j] == -kInfinity) continue;  // hidden: never read V there
    const double p = std::exp(logits[j] - largest);
    sum += p;
    const double* v = plane.v.data() + j * plane.head_size;
    for (std::int64_t d = 0; d < plane.head_size; ++d) {
      answer.out[d] += p * v[d];
      answer.abs[d] += p * std::abs(v[d]);
      answer.random[d] += p * v[d] * p * v[d];
    }
  }
  for (std::int64_t d = 0; d < plane.head_size; ++d) {
    answer.out[d] /= sum;
    answer.abs[d] /= sum;
    answer.random[d] = std::sqrt(answer.random[d]) / sum;
  }
  *answer.lse = largest + std::log(sum);
}

void check_rows(std::span<const Row> rows, const Tensor& query, std::int64_t total_rows) {
  for (const Row& row : rows) {
    const auto inside = [](std::int64_t index, std::int64_t size) { return index >= 0 && index < size; };
    if (!inside(row.batch, query.size(0)) || !inside(row.head, query.size(2)) || !inside(row.query, total_rows)) {
      throw ValueError(fmt::format("Row (batch {}, head {}, query {}) is outside of query {}.", row.batch, row.head,
                                   row.query, shape_name(query)));
    }
  }
}

std::vector<Row> all_rows(const Tensor& query, std::int64_t total_rows) {
  std::vector<Row> rows;
  for (std::int64_t b = 0; b < query.size(0); ++b) {
    for (std::int64_t h = 0; h < query.size(2); ++h) {
      for (std::int64_t i = 0; i < total_rows; ++i) rows.push_back({b, h, i});
    }
  }
  return rows;
}

}  // namespace

Result attention(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionMetadata& metadata,
                 double softmax_scale, bool causal, CausalAlignment alignment, std::span<const Row> wanted) {
  const DLDataType dtype = query.dtype();
  if (dtype != kFloat64 && dtype != kFloat32 && dtype != kFloat16 && dtype != kBFloat16) {
    throw ValueError("The reference takes float64, float32, float16 and bfloat16, not " + dtype_name(dtype) + ".");
  }
  const Rules rules(query, key, metadata, causal, alignment);
  check_rows(wanted, query, rules.rows());
  const std::vector<Row> rows =
      wanted.empty() ? all_rows(query, rules.rows()) : std::vector<Row>(wanted.begin(), wanted.end());
  const auto joint = [&](tvm::ffi::Optional<Tensor> AttentionMetadataFields::*member) {
    return metadata.defined() ? (metadata->fields.*member).value_or(Tensor()) : Tensor();
  };
  const Source queries{query, joint(&AttentionMetadataFields::joint_query)};
  const Source key_source{key, joint(&AttentionMetadataFields::joint_key)};
  const Source value_source{value, joint(&AttentionMetadataFields::joint_value)};
  const std::int64_t head_size = query.size(3);
  const std::int64_t keys = rules.keys();

  // One K/V head of one batch entry after the other, so that each is converted once and memory stays small.
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::size_t>> rows_of_plane;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    rows_of_plane[{rows[r].batch, rows[r].head / (query.size(2) / key.size(2))}].push_back(r);
  }
  Result result{.out = std::vector<double>(rows.size() * head_size),
                .abs = std::vector<double>(rows.size() * head_size),
                .random = std::vector<double>(rows.size() * head_size),
                .lse = std::vector<double>(rows.size())};
  const std::int64_t tasks = std::int64_t{4} * num_threads();
  std::vector<double> scratch(static_cast<std::size_t>(tasks * (keys + head_size)));
  for (const auto& [which, members] : rows_of_plane) {
    const Plane plane(rules, key_source, value_source, which.first, which.second);
    for_each_task(tasks, [&, &members = members](std::int64_t task) {
      double* logits = scratch.data() + task * (keys + head_size);
      double* q = logits + keys;
      for (auto m = static_cast<std::size_t>(task); m < members.size(); m += static_cast<std::size_t>(tasks)) {
        const std::size_t r = members[m];
        const Place place = rules.row_place(rows[r].query);
        for (std::int64_t d = 0; d < head_size; ++d) q[d] = queries.at(place, rows[r].batch, rows[r].head, d);
        attend(rules, softmax_scale, plane, rows[r], q, logits,
               {.out = &result.out[r * head_size],
                .abs = &result.abs[r * head_size],
                .random = &result.random[r * head_size],
                .lse = &result.lse[r]});
      }
    });
  }
  return result;
}

}  // namespace ditattn::reference
