#pragma once

/// Batches between GPUs of one host without NCCL, whose kernels take multiprocessors from what computes meanwhile.
///
/// A rank writes straight into the memory where another receives, so there is one copy, of any size. To know where
/// that is, a sender reads what the receiver's host has posted in the page: hosts go in step, streams do not. On the
/// GPUs the receiver says "ready" when its memory may be written; the sender waits for that, copies, and says "full".
/// What is queued has constants alone, so that graphs may record it. There are two ways:
/// - `beside` other work copy engines carry what moves, in a stream of its own, with flags that streams write and wait
///   for, one from each rank to each other;
/// - `in_turn`, where a stream has nothing else to do, its kernel writes tokens, as they lie, into the other GPU's
///   memory, and the kernels tell each other (kernels/cuda/peer_exchange.hpp). One such batch at a time.
///
/// Every batch first says what is ready, then copies, then waits for what comes. So each wait is for something that
/// another rank queues before its own wait of the same batch, and no order of streams in hardware queues can lock up.
///
/// Rejected: windows of fixed slots, so that hosts need not go in step. What comes would be copied again on its own
/// GPU, by multiprocessors that are not free, or by copy engines, which are slow within one GPU (NCCL's issue 2177).

#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/peer_exchange.hpp"
#include "nccl/nccl_state.hpp"
#include "nccl/outgoing.hpp"
#include "nccl/peer_memory.hpp"

namespace ditattn::parallel {

enum class Lane : std::uint8_t { beside, in_turn };

/// "rank 0 waits in exchange for rank 1", for some ranks.
using WaitingText = std::function<std::string(std::span<const int> ranks)>;

class PeerCopies {
 public:
  /// For the ranks of `over`, together: null where one of them cannot, as `PeerMemory::join`. `state` has the memory,
  /// and must outlive the result.
  static std::unique_ptr<PeerCopies> make(Communicator& over, NcclState& state, cudaStream_t stream);

  PeerCopies(int rank, int size, NcclState& state, std::shared_ptr<PeerPage> page);
  ~PeerCopies();
  PeerCopies(const PeerCopies&) = delete;
  PeerCopies& operator=(const PeerCopies&) = delete;

  /// What does not go this way: it is received in memory that is not PeerMemory's.
  struct Left {
    std::vector<Outgoing> sends;
    std::vector<ReceiveBlock> receives;
    [[nodiscard]] bool is_empty() const { return sends.empty() && receives.empty(); }
  };
  /// Between this rank and another.
  struct Traffic {
    std::vector<Outgoing> sends;
    std::vector<ReceiveBlock> receives;
    std::vector<Destination> at;  ///< of the receives
    std::vector<Destination> to;  ///< of the sends
    std::size_t posted = 0;
  };
  struct Batch {
    Lane lane;
    std::vector<Traffic> with;  ///< by rank
  };

  /// The host waits until the others' have come to this batch too.
  Batch meet(Lane lane, const std::vector<Outgoing>& sends, std::span<const ReceiveBlock> receives,
             const WaitingText& text);
  /// Queues what this rank says and sends; `in_turn` tokens alone, and `copies` on this rank.
  Left send(const Batch& batch, std::span<const kernels::cuda::RowCopy> copies, cudaStream_t stream);
  /// Queues that the stream waits for what comes.
  void await(const Batch& batch, cudaStream_t stream) const;

 private:
  bool meet_one(int peer, Traffic& traffic);
  void copy_own(const Traffic& own, cudaStream_t stream) const;
  void send_by_engines(const Batch& batch, cudaStream_t stream);
  void send_by_kernel(const Batch& batch, std::span<const kernels::cuda::RowCopy> copies, cudaStream_t stream);
  void test_flags(cudaStream_t stream);
  void clear_words(cudaStream_t stream);
  [[nodiscard]] Destination words_destination() const;
  void reach_words(std::span<const Destination> theirs);
  [[nodiscard]] std::uint64_t comes_from(const Batch& batch) const;
  /// Each rank begins with the one after it, so that not all write to the same one; `direction` -1: before it.
  template <class Body>
  void for_each_peer(const Batch& batch, int direction, const Body& body) const;

  const int rank_;
  const int size_;
  NcclState& state_;
  std::shared_ptr<PeerPage> page_;
  Tensor words_memory_;
  kernels::cuda::PeerWords words_;
};

}  // namespace ditattn::parallel
