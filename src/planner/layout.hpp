#pragma once

/// What each rank of a mesh has of a problem, what it sends and what memory it keeps: `src/parallel` by its sizes
/// alone, written down once more so that each can be checked against the other.

#include <cstdint>
#include <vector>

#include "ditattn/parallel.hpp"

namespace ditattn::planner {

struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  [[nodiscard]] std::int64_t size() const { return end - begin; }
};

/// Part `index` of `total` things cut into `parts`: the first ones have one more.
Range share(std::int64_t total, std::int64_t parts, std::int64_t index);

/// The problem; tokens without the text, which all ranks have.
struct Work {
  std::int64_t batch = 1;
  std::int64_t heads = 1;
  std::int64_t kv_heads = 1;
  std::int64_t rows = 1;
  std::int64_t keys = 1;
  std::int64_t text = 0;
  std::int64_t head_size = 1;
  std::int64_t element = 2;  ///< bytes
  bool causal = false;
  bool text_first = true;
};

/// Heads of a place on the first axis. Each run is a call of its own: as many query heads for each K/V head.
struct HeadShare {
  std::int64_t query = 0;
  std::int64_t kv = 0;
  std::vector<std::int64_t> runs;  ///< query heads of each
  [[nodiscard]] bool is_one_run() const { return runs.size() == 1; }
};

/// Bytes to another rank.
struct Message {
  int from;
  int to;
  std::int64_t bytes;
};
using Batch = std::vector<Message>;  ///< what one rank starts together

class Layout {
 public:
  Layout(const Work& work, const parallel::Mesh& mesh);

  [[nodiscard]] int ranks() const { return mesh_.ulysses * mesh_.second(); }
  [[nodiscard]] int places() const { return mesh_.second(); }  ///< on the second axis
  [[nodiscard]] int column(int rank) const { return rank % mesh_.ulysses; }
  [[nodiscard]] int place(int rank) const { return rank / mesh_.ulysses; }
  [[nodiscard]] const Work& work() const { return work_; }
  [[nodiscard]] const parallel::Mesh& mesh() const { return mesh_; }

  [[nodiscard]] std::int64_t rows(int rank) const { return share(work_.rows, ranks(), rank).size(); }
  [[nodiscard]] std::int64_t keys(int rank) const { return share(work_.keys, ranks(), rank).size(); }
  [[nodiscard]] Range row_chunk(int place) const;  ///< the tokens of a place's ranks
  [[nodiscard]] Range key_chunk(int place) const;
  [[nodiscard]] Range text_share(int place) const { return share(work_.text, places(), place); }
  [[nodiscard]] const HeadShare& heads(int column) const { return heads_[static_cast<std::size_t>(column)]; }
  [[nodiscard]] std::int64_t kv_copies() const { return kv_copies_; }  ///< K/V heads of all columns together

  /// Elements of tokens and heads, and their bytes.
  [[nodiscard]] std::int64_t elements(std::int64_t tokens, std::int64_t heads) const {
    return work_.batch * tokens * heads * work_.head_size;
  }
  [[nodiscard]] std::int64_t bytes(std::int64_t tokens, std::int64_t heads) const {
    return elements(tokens, heads) * work_.element;
  }

  [[nodiscard]] Batch before(int rank) const;                 ///< heads of query, key and value
  [[nodiscard]] Batch gather(int rank) const;                 ///< allgather: keys and values
  [[nodiscard]] Message ring_step(int rank, int step) const;  ///< the same, to the next place
  [[nodiscard]] Batch after(int rank) const;                  ///< the output's rows
  [[nodiscard]] Batch text(int rank) const;                   ///< the text's
  [[nodiscard]] std::int64_t sent_bytes(int rank) const;      ///< all of it

  /// From how many parts, of one run of heads each, a place's results of `rows` rows come, where all keys are seen.
  [[nodiscard]] std::int64_t parts(std::int64_t rows) const;
  /// Bytes of keys and values that are copied before they are sent on, as a batch's tokens do not lie together.
  [[nodiscard]] std::int64_t copied_keys(int rank) const;

  /// What a call without an LSE leaves in the group, where all keys are seen and tensors are contiguous.
  [[nodiscard]] std::int64_t workspace_bytes(int rank) const;
  [[nodiscard]] std::int64_t tensor_bytes(int rank) const;  ///< query, key, value and output; not the text's inputs

 private:
  [[nodiscard]] std::int64_t arriving_bytes(int rank) const;
  [[nodiscard]] std::int64_t result_bytes(int rank) const;

  Work work_;
  parallel::Mesh mesh_;
  std::vector<HeadShare> heads_;
  std::int64_t kv_copies_ = 0;
};

}  // namespace ditattn::planner
