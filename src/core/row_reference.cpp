// Rows are grouped by K/V head. A head's keys are converted to float64 block by block, small enough for the first
// cache, once for all rows of the group. Two passes, over K for the logits and over V for the sum, so that the softmax
// is the plain one.

#include "core/row_reference.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <utility>

#include "core/host_rows.hpp"
#include "core/row_sums.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kBlock = 16;  // keys: 16 KiB in float64 for a head size of 128

// A row's element of each key of a segment's mask; null where the mask says nothing of the row.
HostRows read_mask(HostReader& reader, const KeySegment& segment, const Row& row) {
  const MaskView& mask = segment.mask;
  const std::int64_t mask_row = row.query - mask.first_row;
  if (mask.data == nullptr || mask_row < 0 || mask_row >= mask.rows) return {};
  const std::int64_t item = mask.dtype.bits / 8;
  const std::int64_t at = row.batch * mask.strides[0] + row.head * mask.strides[1] + mask_row * mask.strides[2];
  return reader.read(static_cast<const char*>(mask.data) + at * item, mask.strides[3] * item, item, segment.keys);
}

// A row at work: the keys it may see, in joined order, and what comes out.
struct RowState {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::array<std::int64_t, 2> segment_end{};  // of each segment, what its lengths leave
  HostRows query_memory = {};
  std::array<HostRows, 2> mask_memory = {};
  std::vector<double> query = {};   // padded
  std::vector<double> logits = {};  // of the keys [begin, end); −∞: hidden
  double sum = 0;                   // of the weights that logits become
  double longest_key = 0;           // squared
  RowAnswer answer = {};            // padded and not yet divided by the sum, until it is finished
};

// Keys [begin, end) of a segment: elements, one key after the other, and each key's squared length.
struct KeyBlock {
  int segment;
  std::int64_t begin;
  std::int64_t end;
  const double* elements;
  const double* squares;
};

class Group {
 public:
  Group(const AttentionCall& call, const CallPlan& plan, std::int64_t batch, std::int64_t kv_head)
      : plan_(plan),
        dtype_(call.query.dtype()),
        size_(call.query.size(3)),
        stride_((size_ + kLanes - 1) / kLanes * kLanes),
        batch_(batch),
        kv_head_(kv_head),
        reader_(call.query.device()),
        block_(static_cast<std::size_t>(kBlock * stride_)) {}

  void add(const Row& row) {
    RowState state;
    find_keys(row, state);
    for (int i = 0; i < plan_.num_queries; ++i) {
      const QuerySegment& segment = plan_.queries[i];
      const std::int64_t token = row.query - segment.first_row;
      if (token < 0 || token >= segment.tensor.size(1)) continue;
      state.query_memory = reader_.read_head(segment.tensor, batch_, row.head, token, 1);
    }
    for (int s = 0; s < plan_.num_keys; ++s) state.mask_memory[s] = read_mask(reader_, plan_.keys[s], row);
    rows_.push_back(std::move(state));
  }

  // The answers of the rows added, in their order.
  std::vector<RowAnswer> compute(double scale) {
    std::array<HostRows, 2> keys;
    std::array<HostRows, 2> values;
    for (int s = 0; s < plan_.num_keys; ++s) {
      keys[s] = reader_.read_head(plan_.keys[s].key, batch_, kv_head_, 0, plan_.keys[s].keys);
      values[s] = reader_.read_head(plan_.keys[s].value, batch_, kv_head_, 0, plan_.keys[s].keys);
    }
    reader_.wait();
    for (RowState& row : rows_) {
      for (std::vector<double>* elements : {&row.query, &row.answer.out, &row.answer.abs}) {
        elements->assign(static_cast<std::size_t>(stride_), 0);
      }
      to_doubles(row.query_memory.first, dtype_, size_, row.query.data());
      row.logits.assign(static_cast<std::size_t>(row.end - row.begin), -kInfinity);
    }
    for_each_block(keys, [&](RowState& row, const KeyBlock& block) { find_logits(row, block, scale); });
    for (RowState& row : rows_) to_weights(row, scale);
    for_each_block(values, [&](RowState& row, const KeyBlock& block) { add_values(row, block); });
    std::vector<RowAnswer> answers;
    answers.reserve(rows_.size());
    for (RowState& row : rows_) answers.push_back(finished(row));
    return answers;
  }

 private:
  static constexpr double kHidden = -1;  // as a weight

  void find_keys(const Row& row, RowState& state) const {
    state.end = plan_.total_keys;
    if (plan_.ranges) {
      const std::int64_t at = batch_ * plan_.ranges->batch_stride + 2 * row.query;
      state.begin = plan_.ranges->bounds[at];
      state.end = plan_.ranges->bounds[at + 1];
    } else if (plan_.causal) {
      state.end = std::min(state.end, row.query + plan_.causal_offset + 1);
    }
    state.end = std::max(state.begin, state.end);
    for (int s = 0; s < plan_.num_keys; ++s) {
      const KeySegment& segment = plan_.keys[s];
      std::int64_t seen = segment.keys;
      if (segment.prefix != nullptr) {
        const auto& lengths = segment.prefix->kv_lengths;
        const std::int64_t length = lengths[lengths.size() == 1 ? 0 : static_cast<std::size_t>(batch_)];
        seen = std::clamp<std::int64_t>(length - segment.length_offset, 0, segment.keys);
      }
      state.segment_end[s] = std::min(state.end, segment.first_key + seen);
    }
  }

  // What the mask adds to a logit; −∞ hides.
  double added_to(const RowState& row, int segment, std::int64_t key) const {
    const HostRows& mask = row.mask_memory[segment];
    if (mask.first == nullptr) return 0;
    const DLDataType dtype = plan_.keys[segment].mask.dtype;
    const double value = load_element(mask.row(key), 0, dtype);
    if (dtype == kBool) return value != 0 ? 0 : -kInfinity;
    return value;
  }

  void find_logits(RowState& row, const KeyBlock& block, double scale) const {
    for (std::int64_t i = 0; i < block.end - block.begin; ++i) {
      const std::int64_t key = block.begin + i;
      const double added = added_to(row, block.segment, key - plan_.keys[block.segment].first_key);
      if (added == -kInfinity) continue;
      row.logits[key - row.begin] = scale * dot(row.query.data(), block.elements + i * stride_, stride_) + added;
      row.longest_key = std::max(row.longest_key, block.squares[i]);
    }
  }

  // Logits become exp(logit − the largest), `kHidden` for −∞. Their sum is 0 where all are hidden, NaN where one is
  // NaN.
  void to_weights(RowState& row, double scale) const {
    double largest = -kInfinity;
    for (const double logit : row.logits) {
      if (!(logit <= largest)) largest = logit;
      if (std::isnan(largest)) break;
    }
    for (double& logit : row.logits) {
      const double weight = logit == -kInfinity ? kHidden : std::exp(logit - largest);
      if (weight != kHidden) row.sum += weight;
      logit = weight;
    }
    if (row.sum == 0) return;
    row.answer.sees_keys = true;
    row.answer.logit_size =
        std::max(std::abs(scale) * std::sqrt(dot(row.query.data(), row.query.data(), stride_) * row.longest_key),
                 std::abs(largest));
  }

  void add_values(RowState& row, const KeyBlock& block) const {
    std::array<Weighted, kBlock> seen;
    std::size_t count = 0;
    for (std::int64_t i = 0; i < block.end - block.begin; ++i) {
      const double weight = row.logits[block.begin + i - row.begin];
      if (weight == kHidden) continue;
      seen[count++] = {.weight = weight, .values = block.elements + i * stride_};
      row.answer.random_sum += weight * weight * block.squares[i];
    }
    add_weighted({seen.data(), count}, stride_, row.answer.out.data(), row.answer.abs.data());
  }

  [[nodiscard]] RowAnswer finished(RowState& row) const {
    RowAnswer answer = std::move(row.answer);
    answer.random_sum = std::sqrt(answer.random_sum);
    for (std::vector<double>* elements : {&answer.out, &answer.abs}) {
      elements->resize(static_cast<std::size_t>(size_));
      for (double& element : *elements) element /= answer.sees_keys ? row.sum : 1;
    }
    answer.random_sum /= answer.sees_keys ? row.sum : 1;
    return answer;
  }

  // Calls `body(row, block)` for each row and block of keys that it may see.
  template <class Body>
  void for_each_block(const std::array<HostRows, 2>& memory, const Body& body) {
    for (int s = 0; s < plan_.num_keys; ++s) {
      const std::int64_t first = plan_.keys[s].first_key;
      std::int64_t begin = first + plan_.keys[s].keys;
      std::int64_t end = first;
      for (const RowState& row : rows_) {
        begin = std::min(begin, std::max(first, row.begin));
        end = std::max(end, row.segment_end[s]);
      }
      for (std::int64_t block = begin; block < end; block += kBlock) {
        const std::int64_t block_end = std::min(block + kBlock, end);
        for (std::int64_t key = block; key < block_end; ++key) {
          prefetch(memory[s].row(std::min(key + kBlock, end - 1) - first));
          double* elements = block_.data() + (key - block) * stride_;
          to_doubles(memory[s].row(key - first), dtype_, size_, elements);
          squares_[key - block] = dot(elements, elements, stride_);
        }
        for (RowState& row : rows_) {
          const std::int64_t row_begin = std::max(block, row.begin);
          const std::int64_t row_end = std::min(block_end, row.segment_end[s]);
          const std::int64_t skipped = row_begin - block;
          if (row_begin >= row_end) continue;
          body(row, {s, row_begin, row_end, block_.data() + skipped * stride_, squares_.data() + skipped});
        }
      }
    }
  }

  // Heads lie far apart in memory: a key of one is where the processor does not expect it.
  void prefetch(const char* key) const {
    constexpr std::int64_t cache_line = 64;
    for (std::int64_t at = 0; at < size_ * dtype_.bits / 8; at += cache_line) __builtin_prefetch(key + at);
  }

  const CallPlan& plan_;
  DLDataType dtype_;
  std::int64_t size_;
  std::int64_t stride_;  // from key to key in `block_`
  std::int64_t batch_;
  std::int64_t kv_head_;
  HostReader reader_;
  std::vector<double> block_;  // zeros between a key's elements and the next key's
  std::array<double, kBlock> squares_{};
  std::vector<RowState> rows_;
};

void check(const AttentionCall& call, const CallPlan& plan, std::span<const Row> rows) {
  const DLDataType dtype = call.query.dtype();
  if (dtype != kFloat64 && dtype != kFloat32 && dtype != kFloat16 && dtype != kBFloat16) {
    throw ValueError(fmt::format("Rows of {} cannot be checked. Valid dtypes are: float64, float32, float16, bfloat16",
                                 dtype_name(dtype)));
  }
  const auto is_inside = [](std::int64_t index, std::int64_t size) { return index >= 0 && index < size; };
  for (const Row& row : rows) {
    if (is_inside(row.batch, call.query.size(0)) && is_inside(row.head, call.query.size(2)) &&
        is_inside(row.query, plan.total_rows)) {
      continue;
    }
    throw ValueError(
        fmt::format("There is no row (batch {}, head {}, query {}) of {} batch entries, {} heads and {} queries.",
                    row.batch, row.head, row.query, call.query.size(0), call.query.size(2), plan.total_rows));
  }
}

}  // namespace

std::vector<RowAnswer> answer_rows(const AttentionCall& call, double softmax_scale, bool causal,
                                   CausalAlignment alignment, std::span<const Row> rows) {
  const CallPlan plan = call.plan(causal, alignment);
  check(call, plan, rows);
  const std::int64_t heads_per_kv_head = call.query.size(2) / call.key.size(2);
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<std::size_t>> groups;
  for (std::size_t r = 0; r < rows.size(); ++r) groups[{rows[r].batch, rows[r].head / heads_per_kv_head}].push_back(r);
  std::vector<RowAnswer> answers(rows.size());
  for (const auto& [which, members] : groups) {
    Group group(call, plan, which.first, which.second);
    for (const std::size_t r : members) group.add(rows[r]);
    std::vector<RowAnswer> found = group.compute(softmax_scale);
    for (std::size_t i = 0; i < members.size(); ++i) answers[members[i]] = std::move(found[i]);
  }
  return answers;
}

}  // namespace ditattn
