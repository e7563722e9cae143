#pragma once

/// Sequence parallelism: attention whose tokens are spread over ranks (communicator.hpp), by any back end.
///
///     using namespace ditattn::parallel;
///     run_ranks(4, [&](const std::shared_ptr<Communicator>& communicator) {
///       const auto group = std::make_shared<ParallelGroup>(communicator, Mesh{.ulysses = 2, .ring = 2});
///       ParallelAttention layer(backend, {.num_heads = 24, .head_size = 128}, group);
///       Tensor out = layer.forward(my_query, my_key, my_value);  // this rank's tokens in, this rank's rows out
///     });

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ditattn/backend.hpp"
#include "ditattn/communicator.hpp"
#include "ditattn/export.hpp"

namespace ditattn::parallel {

/// How ranks share the work: their number is the product of the degrees, of which `ring` or `allgather` is 1. Rank r
/// has place r mod `ulysses` on the first axis and r div `ulysses` on the second.
struct Mesh {
  int ulysses = 1;    ///< heads are shared out: all-to-all before and after
  int ring = 1;       ///< keys and values go round, step by step; results are merged by their LSE
  int allgather = 1;  ///< keys and values are gathered at once: more memory, one step

  /// The degree of the second axis.
  [[nodiscard]] int second() const { return ring * allgather; }
  /// Equal degrees.
  friend bool operator==(const Mesh&, const Mesh&) = default;
};

/// "ulysses=2, ring=2": degrees that are not 1, "1 rank" without any.
DITATTN_API std::string mesh_name(const Mesh& mesh);
/// The inverse, spaces or not. ValueError names what is allowed.
DITATTN_API Mesh parse_mesh(std::string_view text);

/// Every mesh of so many ranks, the highest degree of `ulysses` first. None where `ranks` is below 1.
DITATTN_API std::vector<Mesh> meshes_of(int ranks);

/// Tokens for each rank, as even as can be: the first ones have one more.
DITATTN_API std::vector<std::int64_t> balanced_lengths(std::int64_t tokens, int ranks);

/// A communicator cut to a mesh, and the memory that calls reuse. Layers share it. Used by one thread at a time.
class DITATTN_API ParallelGroup {
 public:
  /// Called by all ranks of `communicator`. ValueError, on all of them, where degrees do not make their number (with
  /// those that do) or ranks give different meshes.
  ParallelGroup(std::shared_ptr<Communicator> communicator, Mesh mesh);
  ~ParallelGroup();
  ParallelGroup(const ParallelGroup&) = delete;
  ParallelGroup& operator=(const ParallelGroup&) = delete;

  /// As it was given.
  [[nodiscard]] const Mesh& mesh() const;
  /// The one of all ranks.
  [[nodiscard]] Communicator& communicator() const;

 private:
  friend struct GroupAccess;
  std::unique_ptr<struct GroupState> state_;
};

/// An attention layer over all ranks of a group.
class DITATTN_API ParallelAttention {
 public:
  /// `config` is the whole layer's, the same on all ranks; nothing is exchanged. Errors are those of
  /// `AttentionBackend::make`. One warning where `ulysses` is larger than the number of heads: ranks without heads only
  /// pass tokens on.
  ParallelAttention(const BackendClass& backend, const ImplConfig& config, std::shared_ptr<ParallelGroup> group);
  ~ParallelAttention();
  ParallelAttention(const ParallelAttention&) = delete;
  ParallelAttention& operator=(const ParallelAttention&) = delete;

  /// `AttentionImpl::forward` of all ranks' tokens. Called by all ranks.
  ///
  /// query (B, Sq of this rank, H, D), key and value (B, Skv of this rank, Hkv, D): successive tokens of the whole,
  /// rank after rank, any numbers of them, none too; the whole's are the sums. `metadata` is the whole problem's, the
  /// same on every rank: masks have all keys and, where they have rows, all rows; joint text is whole;
  /// `valid_kv_length`, spans, `query_ranges` and cu_seqlens count the whole's tokens. Returns `outputs.out`, or a new
  /// tensor, (B, Sq of this rank + Tq, H, D): text rows, front or rear, are the same bits on every rank. `outputs.lse`
  /// (B, H, the same rows) on all ranks or on none.
  ///
  /// Ranks agree on shapes first. ValueError, on every rank and before any tensor moves: what the back end refuses
  /// alone, or what differs between ranks; where another rank cannot take part, CommunicationError has its reason.
  /// Later errors (memory, a lost rank) end the group. NotImplementedError for tensors on a device that the
  /// communicator does not take.
  ///
  /// On a GPU work is queued in this thread's current stream. Calls of a group share memory: they are made in one
  /// stream, or in streams that the caller orders. The host waits for nothing but for the first call of each kind, in
  /// which ranks agree and memory is allocated, and for masks that it has not seen. A rank that makes such a call again
  /// takes it that all do: calls that are alike on one rank must be alike on all (two totals of which one rank has the
  /// same share are not; pad them, or give each a group). After that a call with `outputs.out` may be captured into a
  /// CUDA graph, which the group must outlive.
  Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionMetadata& metadata = {},
                 const ForwardOutputs& outputs = {});

  /// In the place of `forward`, for a rank that cannot make its call with tensors on `device`: the others' is a
  /// CommunicationError with `reason`, and the group goes on. On a GPU, where the others may not ask this rank, the
  /// group ends. Throws nothing: the rank has an error of its own.
  void refuse(const std::string& reason, DLDevice device) noexcept;

 private:
  struct Layer;
  std::unique_ptr<Layer> layer_;
};

}  // namespace ditattn::parallel
