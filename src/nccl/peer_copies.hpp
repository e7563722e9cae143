#pragma once

/// Batches between GPUs of one host by their copy engines, which take no multiprocessors from what computes meanwhile
/// (NCCL's kernels do).
///
/// A rank writes straight into the memory where another receives, so there is one copy, of any size. To know where
/// that is, a sender reads what the receiver's host has posted in the page: hosts go in step, streams do not. On the
/// GPUs there is one flag from each rank to each other: the receiver's stream says "ready" when its memory may be
/// written, the sender's waits for that, copies, and says "full". What is queued has constants alone, so that graphs
/// may record it.
///
/// Every stream first says what is ready, then copies, then waits for what comes. So each wait is for something that
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

#include "nccl/nccl_state.hpp"
#include "nccl/peer_memory.hpp"

namespace ditattn::parallel {

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
    std::vector<SendBlock> sends;
    std::vector<ReceiveBlock> receives;
  };

  /// Queues the blocks. The host waits until the others' have come to this batch too.
  Left queue(std::span<const SendBlock> sends, std::span<const ReceiveBlock> receives, cudaStream_t stream,
             const WaitingText& text);

 private:
  /// Between this rank and another.
  struct Traffic {
    std::vector<SendBlock> sends;
    std::vector<ReceiveBlock> receives;
    std::vector<Destination> at;  ///< of the receives
    std::vector<Destination> to;  ///< of the sends
    std::size_t posted = 0;
  };
  using AllTraffic = std::vector<Traffic>;  // by rank

  void meet(AllTraffic& all, const WaitingText& text);
  bool meet_one(int peer, Traffic& traffic);
  void copy_own(const Traffic& own, cudaStream_t stream) const;
  void test_flags(cudaStream_t stream);

  const int rank_;
  const int size_;
  NcclState& state_;
  std::shared_ptr<PeerPage> page_;
};

}  // namespace ditattn::parallel
