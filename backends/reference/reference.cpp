#include "backends/reference/reference.hpp"

#include <ditattn/errors.hpp>
#include <ditattn/threads.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <utility>

namespace ditattn::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// parallel_for for a lambda.
template <class Body>
void for_each_task(std::int64_t count, Body body) {
  parallel_for(
      count, [](void* context, std::int64_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

// Elements [batch, token, head, :] of a tensor, as float64.
class RowReader {
 public:
  RowReader(const Tensor& tensor, std::int64_t batch, std::int64_t token, std::int64_t head)
      : data_(data_pointer(tensor)),
        first_(batch * tensor.stride(0) + token * tensor.stride(1) + head * tensor.stride(2)),
        dtype_(tensor.dtype()) {}
  [[nodiscard]] double operator[](std::int64_t d) const { return load_element(data_, first_ + d, dtype_); }

 private:
  const void* data_;
  std::int64_t first_;
  DLDataType dtype_;
};

// The mask as numbers added to logits: −∞ hides. Two dimensions are (batch, keys), others line up from the last.
class Mask {
 public:
  Mask(const AttentionMetadata& metadata, const Tensor& query, const Tensor& key) {
    if (!metadata.defined() || !metadata->fields.attn_mask.has_value()) return;
    mask_ = metadata->fields.attn_mask.value();
    const std::int64_t full[4] = {query.size(0), query.size(2), query.size(1), key.size(1)};
    for (int i = 0; i < mask_.ndim(); ++i) {
      const int dimension = mask_.ndim() == 2 ? (i == 0 ? 0 : 3) : 4 - mask_.ndim() + i;
      if (mask_.size(i) == full[dimension]) strides_[dimension] = mask_.stride(i);
    }
  }

  [[nodiscard]] double added(const Row& row, std::int64_t key) const {
    if (!mask_.defined()) return 0;
    const std::int64_t index =
        row.batch * strides_[0] + row.head * strides_[1] + row.query * strides_[2] + key * strides_[3];
    const double value = load_element(data_pointer(mask_), index, mask_.dtype());
    if (mask_.dtype() != kBool) return value;
    return value != 0 ? 0 : -kInfinity;
  }

 private:
  Tensor mask_;
  std::int64_t strides_[4] = {};
};

// What one K/V head of one batch entry has, in float64. K is transposed so that loops over keys run along memory.
struct Plane {
  Plane(const Tensor& key, const Tensor& value, std::int64_t batch, std::int64_t head)
      : keys(key.size(1)),
        head_size(key.size(3)),
        k_transposed(static_cast<std::size_t>(keys * head_size)),
        v(static_cast<std::size_t>(keys * head_size)) {
    for_each_task(keys, [&](std::int64_t j) {
      const RowReader k_row(key, batch, j, head);
      const RowReader v_row(value, batch, j, head);
      for (std::int64_t d = 0; d < head_size; ++d) {
        k_transposed[d * keys + j] = k_row[d];
        v[j * head_size + d] = v_row[d];
      }
    });
  }
  std::int64_t keys;
  std::int64_t head_size;
  std::vector<double> k_transposed;
  std::vector<double> v;
};

// Everything but the tensors.
struct Rules {
  Mask mask;
  double scale;
  bool causal;
  std::int64_t causal_offset;  // row i sees keys j ≤ i + offset
};

// One row: `query` are its D elements; `logits` has room for one number per key.
void attend(const Rules& rules, const Plane& plane, const Row& row, const double* query, double* logits, double* out,
            double* abs, double* lse) {
  std::fill_n(logits, plane.keys, 0.);
  for (std::int64_t d = 0; d < plane.head_size; ++d) {
    const double* k = plane.k_transposed.data() + d * plane.keys;
    for (std::int64_t j = 0; j < plane.keys; ++j) logits[j] += query[d] * k[j];
  }
  double largest = -kInfinity;
  for (std::int64_t j = 0; j < plane.keys; ++j) {
    const double added = rules.causal && j > row.query + rules.causal_offset ? -kInfinity : rules.mask.added(row, j);
    logits[j] = added == -kInfinity ? -kInfinity : rules.scale * logits[j] + added;
    if (!(logits[j] <= largest)) largest = logits[j];
    if (std::isnan(largest)) break;  // a visible NaN: so is the whole row
  }
  *lse = largest;
  std::fill_n(out, plane.head_size, std::isnan(largest) ? largest : 0.);
  std::fill_n(abs, plane.head_size, std::isnan(largest) ? largest : 0.);
  if (largest == -kInfinity || std::isnan(largest)) return;
  double sum = 0;
  for (std::int64_t j = 0; j < plane.keys; ++j) {
    if (logits[j] == -kInfinity) continue;  // hidden: never read V there
    const double p = std::exp(logits[j] - largest);
    sum += p;
    const double* v = plane.v.data() + j * plane.head_size;
    for (std::int64_t d = 0; d < plane.head_size; ++d) {
      out[d] += p * v[d];
      abs[d] += p * std::abs(v[d]);
    }
  }
  for (std::int64_t d = 0; d < plane.head_size; ++d) {
    out[d] /= sum;
    abs[d] /= sum;
  }
  *lse = largest + std::log(sum);
}

void check_rows(std::span<const Row> rows, const Tensor& query) {
  for (const Row& row : rows) {
    const auto inside = [](std::int64_t index, std::int64_t size) { return index >= 0 && index < size; };
    if (!inside(row.batch, query.size(0)) || !inside(row.head, query.size(2)) || !inside(row.query, query.size(1))) {
      throw ValueError(fmt::format("Row (batch {}, head {}, query {}) is outside of query {}.", row.batch, row.head,
                                   row.query, shape_name(query)));
    }
  }
}

std::vector<Row> all_rows(const Tensor& query) {
  std::vector<Row> rows;
  for (std::int64_t b = 0; b < query.size(0); ++b) {
    for (std::int64_t h = 0; h < query.size(2); ++h) {
      for (std::int64_t i = 0; i < query.size(1); ++i) rows.push_back({b, h, i});
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
  check_rows(wanted, query);
  const std::vector<Row> rows = wanted.empty() ? all_rows(query) : std::vector<Row>(wanted.begin(), wanted.end());
  const Rules rules{.mask = Mask(metadata, query, key),
                    .scale = softmax_scale,
                    .causal = causal,
                    .causal_offset = alignment == CausalAlignment::bottom_right ? key.size(1) - query.size(1) : 0};
  const std::int64_t head_size = query.size(3);
  const std::int64_t keys = key.size(1);

  // One K/V head of one batch entry after the other, so that each is converted once and memory stays small.
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::size_t>> rows_of_plane;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    rows_of_plane[{rows[r].batch, rows[r].head / (query.size(2) / key.size(2))}].push_back(r);
  }
  Result result{.out = std::vector<double>(rows.size() * head_size),
                .abs = std::vector<double>(rows.size() * head_size),
                .lse = std::vector<double>(rows.size())};
  const std::int64_t tasks = std::int64_t{4} * num_threads();
  std::vector<double> scratch(static_cast<std::size_t>(tasks * (keys + head_size)));
  for (const auto& [which, members] : rows_of_plane) {
    const Plane plane(key, value, which.first, which.second);
    for_each_task(tasks, [&, &members = members](std::int64_t task) {
      double* logits = scratch.data() + task * (keys + head_size);
      double* q = logits + keys;
      for (auto m = static_cast<std::size_t>(task); m < members.size(); m += static_cast<std::size_t>(tasks)) {
        const std::size_t r = members[m];
        const RowReader q_row(query, rows[r].batch, rows[r].query, rows[r].head);
        for (std::int64_t d = 0; d < head_size; ++d) q[d] = q_row[d];
        attend(rules, plane, rows[r], q, logits, &result.out[r * head_size], &result.abs[r * head_size],
               &result.lse[r]);
      }
    });
  }
  return result;
}

}  // namespace ditattn::reference
