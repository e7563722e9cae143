#include "tests/kernels/test_problem.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <ostream>

#include "tests/kernels/draw.hpp"
#include "tests/kernels/reference.hpp"

namespace ditattn::kernels::cpu::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kUntouched = -7;

double special(Random& random) { return pick(random, {kNaN, kInf, -kInf}); }

std::int64_t sum(const std::vector<std::int64_t>& parts) {
  return std::accumulate(parts.begin(), parts.end(), std::int64_t{0});
}

// Elements from the first to the last of a (batch, tokens, heads, head_size) view.
std::int64_t extent(const Strides& s, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
                    std::int64_t head_size) {
  if (batch == 0 || tokens == 0 || heads == 0) return 0;
  return (batch - 1) * s.batch + (tokens - 1) * s.token + (heads - 1) * s.head + head_size;
}

// Calls use(batch, token, head, offset of that row).
template <class Use>
void for_each_row(const Strides& s, std::int64_t batch, std::int64_t tokens, std::int64_t heads, Use use) {
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t h = 0; h < heads; ++h) use(b, t, h, b * s.batch + t * s.token + h * s.head);
    }
  }
}

}  // namespace

TestProblem::TestProblem(Spec spec, Random& random) : spec_(std::move(spec)) {
  problem_.batch = spec_.batch;
  problem_.heads = spec_.kv_heads * spec_.group;
  problem_.kv_heads = spec_.kv_heads;
  problem_.rows = sum(spec_.rows);
  problem_.keys = sum(spec_.keys);
  problem_.head_size = spec_.head_size;
  problem_.type = problem_.out_type = spec_.type;
  problem_.scale = static_cast<float>(spec_.scale / std::sqrt(static_cast<double>(spec_.head_size)));

  std::int64_t first = 0;
  for (const std::int64_t rows : spec_.rows) {
    const int i = problem_.num_queries++;
    query[i] = numbers(rows, problem_.heads, random);
    problem_.queries[i] = {.data = query[i].data(), .strides = strides(rows, problem_.heads), .first_row = first};
    first += rows;
  }
  first = 0;
  for (const std::int64_t keys : spec_.keys) {
    const int i = problem_.num_key_segments++;
    key[i] = numbers(keys, problem_.kv_heads, random);
    value[i] = numbers(keys, problem_.kv_heads, random);
    KeySegment& segment = problem_.key_segments[i];
    segment.key = key[i].data();
    segment.value = value[i].data();
    segment.key_strides = segment.value_strides = strides(keys, problem_.kv_heads);
    segment.first_key = first;
    segment.keys = keys;
    first += keys;
    if (spec_.masks[static_cast<std::size_t>(i)].present) make_mask(i, random);
  }
  make_limits(random);
  problem_.causal = spec_.causal;
  problem_.causal_offset = spec_.causal_offset;

  problem_.out_strides = strides(problem_.rows, problem_.heads);
  if (spec_.lse) {
    problem_.lse_strides = {.batch = problem_.rows * problem_.heads, .token = 1, .head = problem_.rows};
  }
  clear_results();
}

// (batch, tokens, heads) or (batch, heads, tokens), with gaps between rows.
Strides TestProblem::strides(std::int64_t tokens, std::int64_t heads) const {
  const std::int64_t row = spec_.head_size + spec_.gap;
  const std::int64_t batch = tokens * heads * row;
  if (spec_.heads_first) return {.batch = batch, .token = row, .head = tokens * row};
  return {.batch = batch, .token = heads * row, .head = row};
}

Buffer TestProblem::numbers(std::int64_t tokens, std::int64_t heads, Random& random) const {
  const Strides s = strides(tokens, heads);
  Buffer buffer(spec_.type, extent(s, spec_.batch, tokens, heads, spec_.head_size), kNaN);
  for_each_row(s, spec_.batch, tokens, heads,
               [&](std::int64_t /*b*/, std::int64_t /*t*/, std::int64_t /*h*/, std::int64_t row) {
                 for (std::int64_t d = 0; d < spec_.head_size; ++d) buffer.set(row + d, real(random, -1.7, 1.7));
               });
  return buffer;
}

void TestProblem::make_mask(int segment, Random& random) {
  const MaskSpec& mask = spec_.masks[static_cast<std::size_t>(segment)];
  const std::int64_t first_row = mask.some_rows ? whole(random, 0, problem_.rows) : 0;
  const std::int64_t rows = mask.some_rows ? whole(random, 0, problem_.rows - first_row) : problem_.rows;
  const std::int64_t key_dimension = (problem_.key_segments[segment].keys - 1) * mask.key_stride + 1;
  Strides s;
  s.token = mask.per_row ? key_dimension : 0;
  s.head = mask.per_head ? (mask.per_row ? rows : 1) * key_dimension : 0;
  s.batch = mask.per_batch ? (mask.per_head ? problem_.heads : 1) * (mask.per_row ? rows : 1) * key_dimension : 0;
  Buffer& buffer = mask_[segment];
  buffer = Buffer(mask.type, std::max<std::int64_t>(0, extent(s, problem_.batch, rows, problem_.heads, key_dimension)),
                  kNaN);
  const bool additive = mask.type != ElementType::boolean;
  for (std::int64_t i = 0; i < buffer.size(); ++i) {
    const bool hidden = chance(random, mask.hidden_fraction);
    const double added = chance(random, 0.2) ? 0 : real(random, -2, 2);
    buffer.set(i, additive ? (hidden ? -kInf : added) : (hidden ? 0 : 1));
  }
  problem_.key_segments[segment].mask = {.data = buffer.data(),
                                         .type = mask.type,
                                         .strides = s,
                                         .key_stride = mask.key_stride,
                                         .first_row = first_row,
                                         .rows = rows};
}

void TestProblem::make_limits(Random& random) {
  for (int i = 0; spec_.lengths && i < problem_.num_key_segments; ++i) {
    KeySegment& segment = problem_.key_segments[i];
    segment.length_offset = whole(random, 0, 3);
    segment.length_stride = whole(random, 0, 2);
    for (std::int64_t n = 0; n < 1 + 2 * spec_.batch; ++n) {
      lengths_[i].push_back(whole(random, 0, segment.keys + 4));  // past either end too
    }
    segment.lengths = lengths_[i].data();
  }
  if (!spec_.ranges) return;
  problem_.range_batch_stride = chance(random, 0.5) ? 2 * problem_.rows : 0;
  for (std::int64_t n = 0; n < problem_.batch * problem_.rows; ++n) {
    const std::int64_t begin = whole(random, 0, problem_.keys);
    ranges_.push_back(begin);
    ranges_.push_back(whole(random, begin, problem_.keys));
  }
  problem_.ranges = ranges_.data();
}

void TestProblem::clear_results() {
  const Strides& s = problem_.out_strides;
  out = Buffer(spec_.type, extent(s, spec_.batch, problem_.rows, problem_.heads, spec_.head_size), kUntouched);
  problem_.out = out.data();
  if (!spec_.lse) return;
  lse = Buffer(ElementType::float32, spec_.batch * problem_.rows * problem_.heads, kUntouched);
  problem_.lse = static_cast<float*>(lse.data());
}

std::int64_t TestProblem::count_overwritten() const {
  std::vector<bool> own(static_cast<std::size_t>(out.size()));
  for_each_row(problem_.out_strides, spec_.batch, problem_.rows, problem_.heads,
               [&](std::int64_t /*b*/, std::int64_t /*t*/, std::int64_t /*h*/, std::int64_t row) {
                 for (std::int64_t d = 0; d < spec_.head_size; ++d) own[static_cast<std::size_t>(row + d)] = true;
               });
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < out.size(); ++i) {
    if (!own[static_cast<std::size_t>(i)] && out.get(i) != kUntouched) ++count;
  }
  return count;
}

void TestProblem::poison_row(Buffer& buffer, std::int64_t first, Random& random) const {
  for (std::int64_t d = 0; d < spec_.head_size; ++d) buffer.set(first + d, special(random));
}

// A mask's element is shared by all that it is broadcast to.
std::vector<bool> TestProblem::seen_mask_elements(int segment) const {
  const KeySegment& own = problem_.key_segments[segment];
  const Mask& mask = own.mask;
  std::vector<bool> seen(static_cast<std::size_t>(mask_[segment].size()));
  for_each_row(mask.strides, problem_.batch, mask.rows, problem_.heads,
               [&](std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t row) {
                 for (std::int64_t k = 0; k < own.keys; ++k) {
                   if (!sees(problem_, b, h, mask.first_row + t, own.first_key + k)) continue;
                   seen[static_cast<std::size_t>(row + k * mask.key_stride)] = true;
                 }
               });
  return seen;
}

void TestProblem::poison_unseen(Random& random) {
  // Hidden elements stay what hides; NaN goes where a length, a range or the diagonal does.
  for (int i = 0; i < problem_.num_key_segments; ++i) {
    const MaskSpec& mask = spec_.masks[static_cast<std::size_t>(i)];
    if (!mask.present || mask.type == ElementType::boolean) continue;
    const std::vector<bool> seen = seen_mask_elements(i);
    for (std::int64_t at = 0; at < mask_[i].size(); ++at) {
      if (!seen[static_cast<std::size_t>(at)] && mask_[i].get(at) != -kInf) mask_[i].set(at, kNaN);
    }
  }
  for (int i = 0; i < problem_.num_key_segments; ++i) {
    const KeySegment& segment = problem_.key_segments[i];
    for_each_row(segment.key_strides, spec_.batch, segment.keys, spec_.kv_heads,
                 [&](std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t at) {
                   for (std::int64_t row = 0; row < problem_.rows; ++row) {
                     for (std::int64_t head = h * spec_.group; head < (h + 1) * spec_.group; ++head) {
                       if (sees(problem_, b, head, row, segment.first_key + t)) return;
                     }
                   }
                   poison_row(key[i], at, random);
                   poison_row(value[i], at, random);
                 });
  }
  for (int i = 0; i < problem_.num_queries; ++i) {
    const QuerySegment& segment = problem_.queries[i];
    for_each_row(segment.strides, spec_.batch, spec_.rows[static_cast<std::size_t>(i)], problem_.heads,
                 [&](std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t at) {
                   for (std::int64_t k = 0; k < problem_.keys; ++k) {
                     if (sees(problem_, b, h, segment.first_row + t, k)) return;
                   }
                   poison_row(query[i], at, random);
                 });
  }
}

void TestProblem::poison_one_seen(Random& random) {
  for (int attempt = 0; attempt < 20 && problem_.rows > 0 && problem_.keys > 0; ++attempt) {
    const std::int64_t b = whole(random, 0, spec_.batch - 1);
    const std::int64_t head = whole(random, 0, problem_.heads - 1);
    const std::int64_t row = whole(random, 0, problem_.rows - 1);
    const std::int64_t k = whole(random, 0, problem_.keys - 1);
    if (!sees(problem_, b, head, row, k)) continue;
    const std::int64_t d = whole(random, 0, spec_.head_size - 1);
    if (chance(random, 0.2)) {
      const int i = problem_.num_queries == 2 && row >= problem_.queries[1].first_row ? 1 : 0;
      const Strides& s = problem_.queries[i].strides;
      const std::int64_t token = row - problem_.queries[i].first_row;
      query[i].set(b * s.batch + token * s.token + head * s.head + d, kNaN);
      return;
    }
    const int i = problem_.num_key_segments == 2 && k >= problem_.key_segments[1].first_key ? 1 : 0;
    const Strides& s = problem_.key_segments[i].key_strides;
    const std::int64_t token = k - problem_.key_segments[i].first_key;
    Buffer& buffer = chance(random, 0.3) ? key[i] : value[i];
    buffer.set(b * s.batch + token * s.token + head / spec_.group * s.head + d, special(random));
    return;
  }
}

std::string to_string(ElementType type) {
  switch (type) {
    case ElementType::float32:
      return "float32";
    case ElementType::float16:
      return "float16";
    case ElementType::bfloat16:
      return "bfloat16";
    case ElementType::boolean:
      return "boolean";
  }
  return "";
}

std::ostream& operator<<(std::ostream& out, const Spec& spec) {
  const auto list = [&](const char* name, const std::vector<std::int64_t>& parts) {
    out << name;
    for (std::size_t i = 0; i < parts.size(); ++i) out << (i == 0 ? "" : "+") << parts[i];
  };
  out << to_string(spec.type) << " batch=" << spec.batch << " heads=" << spec.kv_heads * spec.group << '/'
      << spec.kv_heads;
  list(" rows=", spec.rows);
  list(" keys=", spec.keys);
  out << " head_size=" << spec.head_size << " scale=" << spec.scale << "/√D";
  for (const MaskSpec& mask : spec.masks) {
    if (!mask.present) continue;
    out << " mask(" << to_string(mask.type) << (mask.per_batch ? " batch" : "") << (mask.per_head ? " heads" : "")
        << (mask.per_row ? " rows" : "") << (mask.some_rows ? " window" : "") << " stride=" << mask.key_stride
        << " hidden=" << mask.hidden_fraction << ')';
  }
  if (spec.lengths) out << " lengths";
  if (spec.ranges) out << " ranges";
  if (spec.causal) out << " causal offset=" << spec.causal_offset;
  return out << (spec.lse ? " lse" : "") << (spec.heads_first ? " heads_first" : "") << " gap=" << spec.gap
             << (spec.specials_seen ? " specials_seen" : "") << " threads=" << spec.threads;
}

}  // namespace ditattn::kernels::cpu::testing
