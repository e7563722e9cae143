#pragma once

/// Text and image tokens for engines that read one tensor.

#include <cstdint>
#include <utility>

#include "backends/common/cuda_engine.hpp"
#include "kernels/attention_problem.hpp"
#include "kernels/cuda/engine_rows.hpp"

namespace ditattn {

/// A problem of two segments as one of single tensors in scratch memory: queries, keys and values, 2-byte elements, are
/// copied together. What hides keys becomes lengths where it leaves a prefix, else a mask.
class JoinedProblem {
 public:
  enum class MaskType : std::uint8_t { boolean, additive };

  /// Adds what it needs to `parts`.
  JoinedProblem(const kernels::AttentionProblem& problem, MaskType mask_type, Parts& parts)
      : segments_(problem), joined_(problem) {
    put_lengths_last();
    joined_.num_queries = joined_.num_key_segments = 1;
    query_ = parts.add(problem.batch * problem.rows * problem.heads * problem.head_size * 2);
    const std::int64_t keys = problem.batch * problem.keys * problem.kv_heads * problem.head_size * 2;
    key_ = parts.add(keys);
    value_ = parts.add(keys);
    joined_.queries[0] = {.strides = contiguous(problem.rows, problem.heads)};
    const kernels::Strides of_keys = contiguous(problem.keys, problem.kv_heads);
    joined_.key_segments[0] = {.key_strides = of_keys, .value_strides = of_keys, .keys = problem.keys, .mask = {}};
    if (!hides_nothing() && !join_lengths()) join_masks(mask_type, parts);
  }

  /// The problem as it will be, but its tensors are nowhere yet: for what depends on sizes.
  [[nodiscard]] const kernels::AttentionProblem& problem() const { return joined_; }

  /// The problem with its tensors in `memory`, the parts', for which it queues the copying.
  [[nodiscard]] kernels::AttentionProblem write(char* memory, const kernels::cuda::Launch& launch) const {
    kernels::AttentionProblem problem = joined_;
    kernels::KeySegment& segment = problem.key_segments[0];
    problem.queries[0].data = memory + query_;
    segment.key = memory + key_;
    segment.value = memory + value_;
    if (segment.mask.data != nullptr) segment.mask.data = memory + mask_;
    write_joined(segments_, problem, launch);
    return problem;
  }

 private:
  alignas(256) static constexpr char kNowhere = 0;

  static bool hides_nothing(const kernels::KeySegment& segment) {
    return segment.lengths == nullptr && segment.mask.data == nullptr;
  }
  [[nodiscard]] bool hides_nothing() const {
    return hides_nothing(segments_.key_segments[0]) && hides_nothing(segments_.key_segments[1]);
  }

  [[nodiscard]] kernels::Strides contiguous(std::int64_t tokens, std::int64_t heads) const {
    const std::int64_t token = heads * segments_.head_size;
    return {.batch = tokens * token, .token = token, .head = segments_.head_size};
  }

  // Keys are in no order but the diagonal's: padding of the first segment's, the text's as a rule, is then padding at
  // the end.
  void put_lengths_last() {
    auto& [first, last] = segments_.key_segments;
    if (segments_.causal || first.lengths == nullptr || first.mask.data != nullptr || !hides_nothing(last)) return;
    std::swap(first, last);
    first.first_key = 0;
    last.first_key = first.keys;
  }

  // Whether the keys that are seen are a prefix of all, and so lengths say all.
  bool join_lengths() {
    const auto& [first, last] = segments_.key_segments;
    if (first.mask.data != nullptr || last.mask.data != nullptr) return false;
    const bool last_alone = first.lengths == nullptr && last.length_offset == 0;
    const bool one_mask = first.lengths == last.lengths && first.length_offset == 0 && last.length_offset == first.keys;
    if (!last_alone && !one_mask) return false;
    kernels::KeySegment& joined = joined_.key_segments[0];
    joined.lengths = last.lengths;
    joined.length_stride = last.length_stride;
    joined.length_offset = last_alone ? -first.keys : 0;
    return true;
  }

  void join_masks(MaskType mask_type, Parts& parts) {
    kernels::Mask& joined = joined_.key_segments[0].mask;
    bool by_batch = false;
    bool by_head = false;
    bool by_row = false;
    joined.type = mask_type == MaskType::boolean ? kernels::ElementType::boolean : segments_.type;
    for (const kernels::KeySegment& segment : segments_.key_segments) {
      by_batch |= segment.lengths != nullptr && segment.length_stride != 0;
      const kernels::Mask& mask = segment.mask;
      if (mask.data == nullptr) continue;
      by_batch |= mask.strides.batch != 0;
      by_head |= mask.strides.head != 0;
      by_row |= mask.strides.token != 0 || mask.rows != segments_.rows;
      if (mask.type != kernels::ElementType::boolean && mask.type != segments_.type) {
        joined.type = kernels::ElementType::float32;
      }
    }
    const std::int64_t of_head = (by_row ? segments_.rows : 1) * segments_.keys;
    const std::int64_t of_entry = (by_head ? segments_.heads : 1) * of_head;
    joined.strides = {
        .batch = by_batch ? of_entry : 0, .token = by_row ? segments_.keys : 0, .head = by_head ? of_head : 0};
    joined.data = &kNowhere;
    joined.key_stride = 1;
    joined.rows = segments_.rows;
    mask_ = parts.add((by_batch ? segments_.batch : 1) * of_entry * kernels::element_bytes(joined.type));
  }

  kernels::AttentionProblem segments_;  // in the order of the copies
  kernels::AttentionProblem joined_;
  std::int64_t query_ = 0;
  std::int64_t key_ = 0;
  std::int64_t value_ = 0;
  std::int64_t mask_ = 0;
};

}  // namespace ditattn
