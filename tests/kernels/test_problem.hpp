#pragma once

/// Problems for the kernels: drawn at random or written down, with memory of their own.

#include <array>
#include <cstdint>
#include <iosfwd>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/attention_problem.hpp"
#include "tests/kernels/buffer.hpp"

namespace ditattn::kernels::cpu::testing {

using Random = std::mt19937_64;

/// The dimensions of a mask other than `keys` are there or broadcast.
struct MaskSpec {
  bool present = false;
  ElementType type = ElementType::boolean;
  bool per_batch = false;
  bool per_head = false;
  bool per_row = true;
  std::int64_t key_stride = 1;
  bool some_rows = false;      ///< covers a window of the rows only
  double hidden_fraction = 0;  ///< of the elements; some additive ones are 0 too
};

/// A problem without its numbers.
struct Spec {
  ElementType type = ElementType::float32;
  std::int64_t batch = 1;
  std::int64_t kv_heads = 1;
  std::int64_t group = 1;             ///< query heads per K/V head
  std::vector<std::int64_t> rows{1};  ///< of each query segment
  std::vector<std::int64_t> keys{1};  ///< of each key segment
  std::int64_t head_size = 64;
  double scale = 1;                 ///< times 1 / √head_size
  std::array<MaskSpec, 2> masks{};  ///< of each key segment
  bool lengths = false;
  bool ranges = false;
  bool causal = false;
  std::int64_t causal_offset = 0;
  bool lse = true;
  bool heads_first = false;    ///< (batch, heads, tokens) rather than (batch, tokens, heads)
  std::int64_t gap = 0;        ///< elements between rows of Q, K, V and out
  bool specials_seen = false;  ///< NaN or Inf where some row sees it
  int threads = 1;
};

inline constexpr ElementType kTypes[] = {ElementType::float32, ElementType::float16, ElementType::bfloat16};
std::string to_string(ElementType type);
std::ostream& operator<<(std::ostream& out, const Spec& spec);

/// A spec of at most `work` multiply-adds a product.
Spec random_spec(Random& random, std::int64_t work);

/// A problem with numbers. Gaps between rows hold NaN.
class TestProblem {
 public:
  TestProblem(Spec spec, Random& random);
  TestProblem(TestProblem&&) = delete;

  /// NaN and Inf wherever no row sees them: keys, values, masks, and the queries of rows that see nothing.
  void poison_unseen(Random& random);
  /// NaN or Inf in one element of a key, a value or a query that is seen, if there is one.
  void poison_one_seen(Random& random);

  [[nodiscard]] const Spec& spec() const { return spec_; }
  [[nodiscard]] const AttentionProblem& problem() const { return problem_; }

  Buffer query[2], key[2], value[2];  ///< of each segment; tests may write numbers of their own
  Buffer out, lse;

  void clear_results();
  /// Elements of `out`'s memory that are not the problem's and were written.
  [[nodiscard]] std::int64_t count_overwritten() const;

 private:
  Strides strides(std::int64_t tokens, std::int64_t heads) const;
  Buffer numbers(std::int64_t tokens, std::int64_t heads, Random& random) const;
  void make_mask(int segment, Random& random);
  void make_limits(Random& random);
  void poison_row(Buffer& buffer, std::int64_t first, Random& random) const;
  [[nodiscard]] std::vector<bool> seen_mask_elements(int segment) const;

  Spec spec_;
  AttentionProblem problem_;
  Buffer mask_[2];
  std::vector<std::int64_t> lengths_[2];
  std::vector<std::int64_t> ranges_;
};

}  // namespace ditattn::kernels::cpu::testing
