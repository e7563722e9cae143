#pragma once

/// Ranks, and how bytes go between them: one interface over transports. Here: threads as ranks, in memory.

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "ditattn/errors.hpp"
#include "ditattn/export.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn::parallel {

/// A time in seconds.
using Seconds = std::chrono::duration<double>;

/// How long an operation waits for a peer, where nothing else is said.
inline constexpr Seconds kDefaultTimeout{300};

/// What ranks do together; errors name it.
enum class Operation : std::uint8_t { all_to_all, exchange, all_gather, barrier };
/// "all_to_all", "exchange", …
DITATTN_API std::string_view operation_name(Operation operation);

/// Contiguous bytes for, or from, one rank. Blocks of no bytes are not sent: both sides know the sizes.
struct SendBlock {
  int rank;            ///< that gets it
  const void* data;    ///< on the operation's device
  std::int64_t bytes;  ///< its size
};
/// The other side of a SendBlock.
struct ReceiveBlock {
  int rank;            ///< that sends it
  void* data;          ///< on the operation's device
  std::int64_t bytes;  ///< its size
};

/// Tokens (batch, tokens, heads, size) for one rank, any strides with a unit last one: it gets one block of them, token
/// after token, (tokens, batch, heads, size).
struct SendTokens {
  int rank;       ///< that gets them
  Tensor tokens;  ///< on the operation's device
  void* packed;   ///< memory for them as they are sent: their own where they lie like that
};

/// Tokens of the same shape, dtype and device, any strides with a unit last one.
struct TokenCopy {
  Tensor to;    ///< where they go
  Tensor from;  ///< where they are
};

/// What a stream does between the start of an operation and its end.
enum class Meanwhile : std::uint8_t { compute, nothing };

/// An operation under way. Its memory belongs to it until `wait` has returned, and its communicator must be there.
class DITATTN_API Pending {
 public:
  virtual ~Pending();
  /// Host memory: returns when everything has come and the sent memory may be written again. A device's memory: orders
  /// that before what this thread queues next in its current stream of the device. Once. TimeoutError names a rank
  /// that did not come, the operation and the seconds; CommunicationError a rank that failed, and why.
  virtual void wait() = 0;
};

/// One rank's end of a group of ranks. All ranks of a group call the same operations in the same order; one thread of
/// a rank at a time. After an error that is not a ValueError the communicator, and those split from it, are of no more
/// use.
///
/// A transport implements `start`, which is one batch of sends and receives, and `split` and `abort`. Host memory is
/// taken by every transport, because ranks agree on shapes first; other devices by those that say so.
class DITATTN_API Communicator {
 public:
  /// For transports: rank `rank` of `size`; `timeout` is how long `Pending::wait` waits for a peer.
  Communicator(int rank, int size, Seconds timeout) : rank_(rank), size_(size), timeout_(timeout) {}
  virtual ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  /// This one, from 0.
  [[nodiscard]] int rank() const { return rank_; }
  /// How many ranks there are.
  [[nodiscard]] int size() const { return size_; }
  /// How long an operation waits for a peer.
  [[nodiscard]] Seconds timeout() const { return timeout_; }
  /// Whether blocks may lie in memory of this device.
  [[nodiscard]] virtual bool takes(DLDevice device) const { return device.device_type == kDLCPU; }

  /// Starts sending and receiving, to and from itself too. On a device it follows what this thread has queued in its
  /// current stream (`current_stream`). Blocks between two ranks are matched in their order.
  virtual std::unique_ptr<Pending> start(Operation operation, std::span<const SendBlock> sends,
                                         std::span<const ReceiveBlock> receives, DLDevice device) = 0;

  /// Throws what has failed among operations on a device, which the host does not wait for. After waiting for the
  /// device it tells whether results are what they should be. Thread-safe.
  virtual void throw_if_failed() {}

  /// A group of the ranks that give the same `colour`, in the order of `key`, then of rank. Called by all ranks.
  virtual std::shared_ptr<Communicator> split(int colour, int key) = 0;

  /// For a rank that cannot go on: the others' operations, present and future, fail with a CommunicationError that has
  /// `reason`. Where a transport cannot tell them (MPI), they end with this rank's program, or by their timeout.
  virtual void abort(const std::string& reason) noexcept = 0;

  /// Bytes of a device that `start` takes, to receive into, not initialised. Any memory will do; some transports reach
  /// their own sooner.
  [[nodiscard]] virtual Tensor receive_memory(std::int64_t bytes, DLDevice device);

  /// Whether what `start` moves in a device's memory takes nothing from what computes there: work is cut into parts
  /// then, of which one moves while another is computed. The same on all ranks.
  [[nodiscard]] virtual bool moves_beside_compute(DLDevice /*device*/) const { return false; }

  /// `start` for tokens to other ranks, which are put together where that is needed, and for `copies` on this one, in
  /// its stream. `meanwhile`: where the stream has nothing else to do, a transport may use all of the device.
  virtual std::unique_ptr<Pending> start_tokens(Operation operation, std::span<const SendTokens> sends,
                                                std::span<const ReceiveBlock> receives, DLDevice device,
                                                Meanwhile meanwhile, std::span<const TokenCopy> copies);

  /// Block r of `send`, `send_bytes[r]` long, goes to rank r; block r of `receive` comes from it. Blocks lie one after
  /// the other.
  std::unique_ptr<Pending> all_to_all(const void* send, std::span<const std::int64_t> send_bytes, void* receive,
                                      std::span<const std::int64_t> receive_bytes, DLDevice device = kCpu);
  /// To one rank and from one: a step of a ring.
  std::unique_ptr<Pending> exchange(const SendBlock& send, const ReceiveBlock& receive, DLDevice device = kCpu);
  /// Rank r gives `bytes[r]`; all get all, one after the other.
  std::unique_ptr<Pending> all_gather(const void* send, void* receive, std::span<const std::int64_t> bytes,
                                      DLDevice device = kCpu);
  /// Returns when all ranks have come.
  void barrier();

 private:
  int rank_;
  int size_;
  Seconds timeout_;
};

struct ThreadWorldState;

/// Ranks that are threads of this process. What is sent is copied when an operation starts, and again when it is waited
/// for. On a GPU too, of which ranks may share one; the host waits for its copies then: for tests, not for speed. The
/// object may go before its communicators. ValueError unless size and timeout are positive.
class DITATTN_API ThreadWorld {
 public:
  /// `size` ranks; `timeout` is how long their operations wait for each other.
  explicit ThreadWorld(int size, Seconds timeout = kDefaultTimeout);
  /// The end of `rank`; ask once per rank. Thread-safe.
  [[nodiscard]] std::shared_ptr<Communicator> communicator(int rank) const;

 private:
  std::shared_ptr<ThreadWorldState> state_;
};

/// Calls `body` as `size` ranks, each in a thread of its own, and waits for all. Where one throws, the others'
/// operations fail at once, and what was thrown first is thrown here (before a CommunicationError, which the others
/// get of it).
DITATTN_API void run_ranks(int size, const std::function<void(const std::shared_ptr<Communicator>&)>& body,
                           Seconds timeout = kDefaultTimeout);

}  // namespace ditattn::parallel
