#include "tests/kernels/reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/kernels/buffer.hpp"

namespace ditattn::kernels::cpu::testing {
const KeySegment& segment_of(const AttentionProblem& problem, std::int64_t key) {
  const bool second = problem.num_key_segments == 2 && key >= problem.key_segments[1].first_key;
  return problem.key_segments[second ? 1 : 0];
}

Row read_row(const AttentionProblem& problem, const void* data, const Strides& strides, std::int64_t batch,
             std::int64_t token, std::int64_t head) {
  Row row(static_cast<std::size_t>(problem.head_size));
  const std::int64_t first = batch * strides.batch + token * strides.token + head * strides.head;
  for (std::size_t d = 0; d < row.size(); ++d) {
    row[d] = read_element(data, problem.type, first + static_cast<std::int64_t>(d));
  }
  return row;
}

Row read_query(const AttentionProblem& problem, std::int64_t batch, std::int64_t row, std::int64_t head) {
  const bool second = problem.num_queries == 2 && row >= problem.queries[1].first_row;
  const QuerySegment& segment = problem.queries[second ? 1 : 0];
  return read_row(problem, segment.data, segment.strides, batch, row - segment.first_row, head);
}

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// What is added to the scaled logit; −∞ hides.
double mask_value(const Mask& mask, std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t key) {
  if (mask.data == nullptr || row < mask.first_row || row >= mask.first_row + mask.rows) return 0;
  const double element = read_element(mask.data, mask.type,
                                      batch * mask.strides.batch + head * mask.strides.head +
                                          (row - mask.first_row) * mask.strides.token + key * mask.key_stride);
  if (mask.type != ElementType::boolean) return element;
  return element != 0 ? 0 : -kInf;
}

double mask_of(const AttentionProblem& problem, std::int64_t batch, std::int64_t head, std::int64_t row,
               std::int64_t key) {
  const KeySegment& segment = segment_of(problem, key);
  return mask_value(segment.mask, batch, head, row, key - segment.first_key);
}

struct KeysAndValues {
  std::vector<Row> keys, values;
};

KeysAndValues read_keys(const AttentionProblem& problem, std::int64_t batch, std::int64_t kv_head) {
  KeysAndValues result;
  for (std::int64_t key = 0; key < problem.keys; ++key) {
    const KeySegment& segment = segment_of(problem, key);
    const std::int64_t token = key - segment.first_key;
    result.keys.push_back(read_row(problem, segment.key, segment.key_strides, batch, token, kv_head));
    result.values.push_back(read_row(problem, segment.value, segment.value_strides, batch, token, kv_head));
  }
  return result;
}

struct Logit {
  std::int64_t key;
  double value;
};

std::vector<Logit> logits_of(const AttentionProblem& problem, const KeysAndValues& kv, std::int64_t batch,
                             std::int64_t head, std::int64_t row) {
  const Row query = read_query(problem, batch, row, head);
  std::vector<Logit> logits;
  for (std::int64_t key = 0; key < problem.keys; ++key) {
    if (!sees(problem, batch, head, row, key)) continue;
    const Row& k = kv.keys[static_cast<std::size_t>(key)];
    double dot = 0;
    for (std::size_t d = 0; d < k.size(); ++d) dot += query[d] * k[d];
    logits.push_back({.key = key, .value = problem.scale * dot + mask_of(problem, batch, head, row, key)});
  }
  return logits;
}

// Adds one row to the results: zeros and −∞ where nothing is seen.
void append_row(const std::vector<Logit>& logits, const KeysAndValues& kv, std::size_t head_size, Expected& expected) {
  double max = -kInf;
  for (const Logit& logit : logits) max = std::isnan(logit.value) ? logit.value : std::max(max, logit.value);
  const std::size_t first = expected.out.size();
  expected.out.resize(first + head_size);
  expected.magnitude.resize(first + head_size);
  if (max == -kInf) {
    expected.lse.push_back(-kInf);
    return;
  }
  double sum = 0;
  for (const Logit& logit : logits) sum += std::exp(logit.value - max);
  for (const Logit& logit : logits) {
    const double p = std::exp(logit.value - max) / sum;
    const Row& v = kv.values[static_cast<std::size_t>(logit.key)];
    for (std::size_t d = 0; d < head_size; ++d) {
      expected.out[first + d] += p * v[d];
      expected.magnitude[first + d] += p * std::fabs(v[d]);
    }
  }
  expected.lse.push_back(max + std::log(sum));
}

}  // namespace

bool sees(const AttentionProblem& problem, std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t key) {
  const KeySegment& segment = segment_of(problem, key);
  if (segment.lengths != nullptr) {
    const std::int64_t length = segment.lengths[batch * segment.length_stride] - segment.length_offset;
    if (key - segment.first_key >= length) return false;
  }
  if (problem.ranges != nullptr) {
    const std::int64_t* range = problem.ranges + batch * problem.range_batch_stride + 2 * row;
    if (key < range[0] || key >= range[1]) return false;
  }
  if (problem.causal && key > row + problem.causal_offset) return false;
  return mask_of(problem, batch, head, row, key) != -kInf;
}

Expected expected_results(const AttentionProblem& problem) {
  Expected expected;
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    std::vector<KeysAndValues> kv;
    for (std::int64_t head = 0; head < problem.kv_heads; ++head) kv.push_back(read_keys(problem, batch, head));
    for (std::int64_t row = 0; row < problem.rows; ++row) {
      for (std::int64_t head = 0; head < problem.heads; ++head) {
        const KeysAndValues& own = kv[static_cast<std::size_t>(head / (problem.heads / problem.kv_heads))];
        append_row(logits_of(problem, own, batch, head, row), own, static_cast<std::size_t>(problem.head_size),
                   expected);
      }
    }
  }
  return expected;
}

}  // namespace ditattn::kernels::cpu::testing
