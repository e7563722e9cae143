#pragma once

/// Host memory that the ranks of a communicator share, and their GPUs map: where each tells the others what they write
/// to, when they may, and when they have.

#include <cuda_runtime.h>
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace ditattn::parallel {

/// Where a block is received, in memory that the sender may open. `offset` < 0: in other memory.
struct Destination {
  cudaIpcMemHandle_t memory;
  std::int64_t offset;
  std::int64_t bytes;
};

/// What a flag says. Each of them is a bit, so that the poison ends whatever waits for one.
enum class Flag : std::uint32_t { full = 1, ready = 2, poison = 3 };

/// Why a rank gave up.
struct PeerFailure {
  bool late;
  std::string text;
};

class PeerPage {
 public:
  /// How another process of the host opens a page: as a file of the process that made it.
  struct Ticket {
    pid_t process;
    int file;
    std::uint64_t number;  ///< drawn at random: another file has another one
  };

  /// Makes one for so many ranks; opens one that another process has made. std::runtime_error says why not.
  PeerPage(int rank, int ranks);
  PeerPage(int rank, int ranks, const Ticket& ticket);
  ~PeerPage();
  PeerPage(const PeerPage&) = delete;
  PeerPage& operator=(const PeerPage&) = delete;

  /// While it is there, and no longer.
  [[nodiscard]] Ticket ticket() const;
  /// When all have it open.
  void close_file();

  /// For rank `from`, which sends; false: its mailbox is full. In the order of `take`, by one thread at a time.
  bool post(int from, const Destination& destination);
  /// What rank `to` has posted next.
  std::optional<Destination> take(int to);

  /// For the GPU's stream operations: what goes between two ranks, one of them this one. The only place that says
  /// where flags are: in host memory, because the host must be able to write them while streams wait.
  [[nodiscard]] std::uintptr_t flag(int from, int to) const;
  [[nodiscard]] std::uint32_t flag_value(int from, int to) const;
  /// The flag of this rank to itself, for kernels: nothing else uses it, and the poison stays there.
  [[nodiscard]] const std::uint32_t* own_flag() const;

  /// The first reason stays, and all ranks see it.
  void fail(const PeerFailure& failure);
  [[nodiscard]] std::optional<PeerFailure> failure() const;
  /// Ends every wait of this rank's GPU that has begun. An operation that follows overwrites the poison: so this is to
  /// be repeated until the streams are through.
  void poison();

  /// This rank uses no memory of others any more; whether that is true of all, processes that are gone among them.
  void leave();
  [[nodiscard]] bool have_all_left() const;

 private:
  struct Layout;
  void map(int file);
  void attach_gpu();
  [[nodiscard]] const char* flag_on_gpu(int from, int to) const;

  int rank_;
  int ranks_;
  int file_ = -1;
  std::size_t bytes_;
  Layout* layout_ = nullptr;
  char* on_gpu_ = nullptr;
};

}  // namespace ditattn::parallel
