#include "tests/kernels/sage3_reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ditattn::kernels::cpu::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (std::size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

// Both are float32 numbers, and so is the difference.
Row minus(const Row& row, const Row& mean) {
  Row result(row.size());
  for (std::size_t d = 0; d < row.size(); ++d) {
    result[d] = static_cast<float>(row[d]) - static_cast<float>(mean[d]);
  }
  return result;
}

float largest(const Row& row) {
  double result = 0;
  for (const double x : row) result = std::max(result, std::fabs(x));
  return static_cast<float>(result);
}

float scale_of(float largest) { return largest > kSage3LeastNumber ? nvfp4_scale(largest) : 0; }

// What NVFP4 makes of numbers, in groups from the first on, under one scale.
Row quantized(const Row& numbers, float scale) {
  Row result(numbers.size());
  for (std::size_t first = 0; first < numbers.size(); first += kNvfp4Group) {
    const std::size_t limit = std::min(first + kNvfp4Group, numbers.size());
    float most = 0;
    for (std::size_t i = first; i < limit; ++i) most = std::fmax(most, std::fabs(static_cast<float>(numbers[i])));
    const float group_scale = nvfp4_group_scale(most, scale);
    for (std::size_t i = first; i < limit; ++i) {
      const float number = nvfp4_number(static_cast<float>(numbers[i]), group_scale, scale);
      result[i] = static_cast<double>(number) * group_scale * scale;
    }
  }
  return result;
}

// Step 1's sums, of one tensor.
struct Channels {
  Row sum, most;
  std::int64_t rows = 0;

  explicit Channels(std::int64_t head_size) : sum(static_cast<std::size_t>(head_size)), most(sum.size()) {}

  void add(const Row& row) {
    if (!std::all_of(row.begin(), row.end(), [](double x) { return std::isfinite(x); })) return;
    ++rows;
    for (std::size_t d = 0; d < row.size(); ++d) {
      sum[d] += row[d];
      most[d] = std::max(most[d], std::fabs(row[d]));
    }
  }

  // All of them, of K, or those that are worth it, of Q and V.
  [[nodiscard]] Row means(bool smooth, bool all) const {
    Row result(sum.size());
    if (!smooth || rows == 0 || (!all && rows <= kSage3LeastMean)) return result;
    for (std::size_t d = 0; d < sum.size(); ++d) {
      const double mean = static_cast<float>(sum[d] / static_cast<double>(rows));
      if (all || std::fabs(mean) * kSage3LeastMean >= most[d]) result[d] = mean;
    }
    return result;
  }
};

// 128 keys of a segment, or what is left of it.
struct Block {
  std::int64_t first_key = 0;   // of all segments'
  std::vector<Row> smooth_key;  // k − k̄, zeros where no row sees the key
  std::vector<Row> key, value;  // K̂ and V̂
};

struct KeyHead {
  Row key_mean, value_mean;
  std::vector<Block> blocks;
};

// Masks are the same for all heads.
bool some_row_sees(const AttentionProblem& problem, std::int64_t batch, std::int64_t key) {
  for (std::int64_t row = 0; row < problem.rows; ++row) {
    if (sees(problem, batch, 0, row, key)) return true;
  }
  return false;
}

// Steps 3 and 6; `keys` and `values` are those of the block, less their means.
Block quantize_block(std::int64_t first_key, const std::vector<Row>& keys, const std::vector<Row>& values) {
  Block block{.first_key = first_key, .smooth_key = keys, .key = {}, .value = values};
  float most_key = 0;
  float most_value = 0;
  for (const Row& key : keys) most_key = std::max(most_key, largest(key));
  for (const Row& value : values) most_value = std::max(most_value, largest(value));
  for (const Row& key : keys) block.key.push_back(quantized(key, scale_of(most_key)));
  for (std::size_t d = 0; d < keys[0].size(); ++d) {
    Row channel;
    for (const Row& value : values) channel.push_back(value[d]);
    channel = quantized(channel, scale_of(most_value));
    for (std::size_t i = 0; i < channel.size(); ++i) block.value[i][d] = channel[i];
  }
  return block;
}

KeyHead read_key_head(const AttentionProblem& problem, std::int64_t batch, std::int64_t kv_head,
                      const std::vector<bool>& seen, Sage3Smoothing smoothing) {
  std::vector<Row> keys, values;
  Channels key_channels(problem.head_size);
  Channels value_channels(problem.head_size);
  for (std::int64_t key = 0; key < problem.keys; ++key) {
    const KeySegment& segment = segment_of(problem, key);
    const std::int64_t token = key - segment.first_key;
    keys.push_back(read_row(problem, segment.key, segment.key_strides, batch, token, kv_head));
    values.push_back(read_row(problem, segment.value, segment.value_strides, batch, token, kv_head));
    if (!seen[static_cast<std::size_t>(key)]) continue;
    key_channels.add(keys.back());
    value_channels.add(values.back());
  }
  KeyHead head{.key_mean = key_channels.means(smoothing.key, true),
               .value_mean = value_channels.means(smoothing.value, false),
               .blocks = {}};
  for (std::size_t key = 0; key < keys.size(); ++key) {
    keys[key] = seen[key] ? minus(keys[key], head.key_mean) : Row(keys[key].size());
    values[key] = seen[key] ? minus(values[key], head.value_mean) : Row(values[key].size());
  }
  for (int i = 0; i < problem.num_key_segments; ++i) {
    const KeySegment& segment = problem.key_segments[i];
    for (std::int64_t first = 0; first < segment.keys; first += kSage3Keys) {
      const std::int64_t begin = segment.first_key + first;
      const std::int64_t end = segment.first_key + std::min(first + kSage3Keys, segment.keys);
      head.blocks.push_back(quantize_block(begin, {keys.begin() + begin, keys.begin() + end},
                                           {values.begin() + begin, values.begin() + end}));
    }
  }
  return head;
}

Row query_mean(const AttentionProblem& problem, std::int64_t batch, std::int64_t head, bool smooth) {
  Channels channels(problem.head_size);
  for (std::int64_t row = 0; row < problem.rows; ++row) channels.add(read_query(problem, batch, row, head));
  return channels.means(smooth, false);
}

struct RowIndex {
  std::int64_t batch, row, head;
};

// Steps 2, 4, 5 and 7. Adds zeros and −∞ for a row without keys.
void append_row(const AttentionProblem& problem, RowIndex index, const Row& query_mean, const KeyHead& kv,
                Expected& expected) {
  const Row query = read_query(problem, index.batch, index.row, index.head);
  const Row smooth_query = minus(query, query_mean);
  const Row quantized_query = quantized(smooth_query, scale_of(largest(smooth_query)));
  std::vector<Row> logits;  // of each block; −∞ where the row does not see the key
  Row block_max;
  for (const Block& block : kv.blocks) {
    Row& own = logits.emplace_back(block.key.size(), -kInf);
    for (std::size_t i = 0; i < own.size(); ++i) {
      const std::int64_t key = block.first_key + static_cast<std::int64_t>(i);
      if (!sees(problem, index.batch, index.head, index.row, key)) continue;
      own[i] = problem.scale * (dot(quantized_query, block.key[i]) + dot(query_mean, block.smooth_key[i]));
    }
    block_max.push_back(*std::max_element(own.begin(), own.end()));
  }
  const double max = block_max.empty() ? -kInf : *std::max_element(block_max.begin(), block_max.end());
  const std::size_t first = expected.out.size();
  expected.out.resize(first + query.size());
  expected.magnitude.resize(first + query.size());
  if (max == -kInf) {
    expected.lse.push_back(-kInf);
    return;
  }
  double sum = 0;
  for (std::size_t b = 0; b < logits.size(); ++b) {
    if (block_max[b] == -kInf) continue;
    Row p = logits[b];
    for (double& x : p) x = kSage3ProbabilityMost * std::exp(x - block_max[b]);
    const Row quantized_p = quantized(p, 1);
    const double weight = std::exp(block_max[b] - max) / kSage3ProbabilityMost;
    for (std::size_t i = 0; i < p.size(); ++i) {
      const Row& value = kv.blocks[b].value[i];
      sum += weight * p[i];
      for (std::size_t d = 0; d < value.size(); ++d) {
        expected.out[first + d] += weight * quantized_p[i] * value[d];
        expected.magnitude[first + d] += weight * p[i] * std::fabs(value[d]);
      }
    }
  }
  for (std::size_t d = 0; d < query.size(); ++d) {
    expected.out[first + d] = expected.out[first + d] / sum + kv.value_mean[d];
    expected.magnitude[first + d] = expected.magnitude[first + d] / sum + std::fabs(kv.value_mean[d]);
  }
  expected.lse.push_back(max + std::log(sum) + problem.scale * dot(query, kv.key_mean));
}

}  // namespace

Expected expected_sage3_results(const AttentionProblem& problem, Sage3Smoothing smoothing) {
  Expected expected;
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    std::vector<bool> seen;
    for (std::int64_t key = 0; key < problem.keys; ++key) seen.push_back(some_row_sees(problem, batch, key));
    std::vector<KeyHead> kv;
    for (std::int64_t head = 0; head < problem.kv_heads; ++head) {
      kv.push_back(read_key_head(problem, batch, head, seen, smoothing));
    }
    std::vector<Row> query_means;
    for (std::int64_t head = 0; head < problem.heads; ++head) {
      query_means.push_back(query_mean(problem, batch, head, smoothing.query));
    }
    for (std::int64_t row = 0; row < problem.rows; ++row) {
      for (std::int64_t head = 0; head < problem.heads; ++head) {
        append_row(problem, {.batch = batch, .row = row, .head = head}, query_means[static_cast<std::size_t>(head)],
                   kv[static_cast<std::size_t>(head / (problem.heads / problem.kv_heads))], expected);
      }
    }
  }
  return expected;
}

}  // namespace ditattn::kernels::cpu::testing
