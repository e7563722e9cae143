#include "tests/kernels/sage_reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

namespace ditattn::kernels::cpu::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr std::int64_t kBlockKeys = 128;

// 2^x as the kernels have it: of degree 3 between whole numbers.
double exp2_short(double x) {
  if (x == -kInf) return 0;
  const double n = std::floor(x);
  const double r = x - n;
  return std::ldexp(((0.077066995 * r + 0.22764507) * r + 0.69511676) * r + 1, static_cast<int>(n));
}

bool finite(const Row& row) {
  return std::all_of(row.begin(), row.end(), [](double x) { return std::isfinite(x); });
}

double largest(const Row& row) {
  double result = 0;
  for (const double x : row) result = std::max(result, std::fabs(x));
  return result;
}

// Whole numbers and what they are times.
struct Quantized {
  Row numbers;
  double scale = 0;

  Quantized(const Row& row, double most) : numbers(row.size()), scale(largest(row) / most) {
    for (std::size_t d = 0; d < row.size(); ++d) {
      numbers[d] = largest(row) > 1e-30 ? std::nearbyint(row[d] / scale) : 0;
    }
  }
};

// Keys of a block that some row of the problem sees, each quantized.
struct Block {
  Row mean;
  std::vector<std::int64_t> keys;
  std::vector<Quantized> key;
  std::vector<Row> values;  // as the kernel sees them
};

bool some_row_may_see(const AttentionProblem& problem, std::int64_t batch, std::int64_t key) {
  std::int64_t begin = problem.keys;
  std::int64_t end = 0;
  for (std::int64_t row = 0; row < problem.rows; ++row) {
    std::int64_t first = 0;
    std::int64_t limit = problem.causal ? row + problem.causal_offset + 1 : problem.keys;
    if (problem.ranges != nullptr) {
      const std::int64_t* range = problem.ranges + batch * problem.range_batch_stride + 2 * row;
      first = range[0];
      limit = range[1];
      if (first >= limit) continue;
    }
    begin = std::min(begin, first);
    end = std::max(end, limit);
  }
  return key >= begin && key < end;
}

// Masks and lengths alone, which are the same for all rows.
bool is_present(const AttentionProblem& problem, std::int64_t batch, std::int64_t key) {
  AttentionProblem plain = problem;
  plain.ranges = nullptr;
  plain.causal = false;
  return sees(plain, batch, 0, 0, key) && some_row_may_see(problem, batch, key);
}

Block read_block(const AttentionProblem& problem, std::int64_t batch, std::int64_t kv_head, std::int64_t first,
                 std::int64_t limit, const SageNumbers& numbers) {
  Block block{.mean = Row(static_cast<std::size_t>(problem.head_size)), .keys = {}, .key = {}, .values = {}};
  std::vector<Row> keys;
  for (std::int64_t key = first; key < limit; ++key) {
    if (!is_present(problem, batch, key)) continue;
    const KeySegment& segment = segment_of(problem, key);
    const std::int64_t token = key - segment.first_key;
    block.keys.push_back(key);
    keys.push_back(read_row(problem, segment.key, segment.key_strides, batch, token, kv_head));
    block.values.push_back(read_row(problem, segment.value, segment.value_strides, batch, token, kv_head));
  }
  for (const Row& key : keys) {
    for (std::size_t d = 0; d < key.size() && numbers.smooth_key && finite(key); ++d) {
      block.mean[d] += key[d] / static_cast<double>(keys.size());
    }
  }
  for (Row& key : keys) {
    if (!finite(key)) key = block.mean;  // no row of these problems sees it
    for (std::size_t d = 0; d < key.size(); ++d) key[d] -= block.mean[d];
    block.key.emplace_back(key, numbers.key_most);
  }
  for (std::size_t d = 0; d < block.mean.size(); ++d) {
    Row channel;
    for (const Row& value : block.values) channel.push_back(std::isfinite(value[d]) ? value[d] : 0);
    const Quantized quantized(channel, 127);
    for (std::size_t i = 0; i < channel.size(); ++i) {
      block.values[i][d] = numbers.wide_values ? channel[i] : quantized.numbers[i] * quantized.scale;
    }
  }
  return block;
}

// One row's sums over its blocks.
struct RowSums {
  double max = -kInf;  // to the base 2
  double sum = 0;
  Row out, magnitude;

  void add(const AttentionProblem& problem, const Block& block, const Row& query, std::int64_t batch, std::int64_t head,
           std::int64_t row, const SageNumbers& numbers) {
    const Quantized quantized(query, 127);
    double mean_product = 0;
    for (std::size_t d = 0; d < query.size(); ++d) mean_product += query[d] * block.mean[d];
    std::vector<double> logits(block.keys.size(), -kInf);
    double block_max = -kInf;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (!sees(problem, batch, head, row, block.keys[i])) continue;
      double dot = 0;
      for (std::size_t d = 0; d < query.size(); ++d) dot += quantized.numbers[d] * block.key[i].numbers[d];
      logits[i] = dot * block.key[i].scale * quantized.scale + mean_product;
      block_max = std::max(block_max, logits[i]);
    }
    if (block_max == -kInf) return;
    const double new_max = std::max(max, block_max);
    const double shrink = exp2_short(max - new_max);
    const double most = numbers.wide_values ? 1 : numbers.probability_most;
    const double log2_most = most == 255   ? 7.99445906508949
                             : most == 127 ? 6.988772825199174
                                           : 0;  // exp2_short's inverse
    const double weight = exp2_short(block_max - new_max) / most;
    sum *= shrink;
    for (std::size_t d = 0; d < out.size(); ++d) out[d] *= shrink, magnitude[d] *= shrink;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const double p = exp2_short(logits[i] - block_max + log2_most);
      const double number = numbers.wide_values ? p : std::nearbyint(p);
      sum += weight * p;
      for (std::size_t d = 0; d < out.size(); ++d) {
        out[d] += weight * number * block.values[i][d];
        magnitude[d] += weight * p * std::fabs(block.values[i][d]);
      }
    }
    max = new_max;
  }
};

}  // namespace

Expected expected_sage_results(const AttentionProblem& problem, const SageNumbers& numbers) {
  Expected expected;
  for (std::int64_t batch = 0; batch < problem.batch; ++batch) {
    std::vector<std::vector<Block>> blocks(static_cast<std::size_t>(problem.kv_heads));
    for (std::int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
      for (int i = 0; i < problem.num_key_segments; ++i) {
        const KeySegment& segment = problem.key_segments[i];
        for (std::int64_t first = 0; first < segment.keys; first += kBlockKeys) {
          const std::int64_t limit = std::min(first + kBlockKeys, segment.keys);
          blocks[static_cast<std::size_t>(kv_head)].push_back(
              read_block(problem, batch, kv_head, segment.first_key + first, segment.first_key + limit, numbers));
        }
      }
    }
    for (std::int64_t row = 0; row < problem.rows; ++row) {
      for (std::int64_t head = 0; head < problem.heads; ++head) {
        Row query = read_query(problem, batch, row, head);
        for (double& x : query) x *= problem.scale * std::log2(std::exp(1.0));
        RowSums sums{.out = Row(query.size()), .magnitude = Row(query.size())};
        for (const Block& block : blocks[static_cast<std::size_t>(head / (problem.heads / problem.kv_heads))]) {
          sums.add(problem, block, query, batch, head, row, numbers);
        }
        for (const double x : sums.out) expected.out.push_back(sums.sum > 0 ? x / sums.sum : 0);
        for (const double x : sums.magnitude) expected.magnitude.push_back(sums.sum > 0 ? x / sums.sum : 0);
        expected.lse.push_back(sums.sum > 0 ? sums.max * std::log(2.0) + std::log(sums.sum) : -kInf);
      }
    }
  }
  return expected;
}

}  // namespace ditattn::kernels::cpu::testing
