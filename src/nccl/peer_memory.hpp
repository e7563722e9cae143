#pragma once

/// A GPU's memory that other processes of the host open (CUDA's IPC), and theirs that this one has opened.

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ditattn/communicator.hpp"
#include "nccl/peer_page.hpp"

namespace ditattn::parallel {

/// What DITATTN_PEER_COPIES says. ValueError for anything else.
enum class PeerCopiesMode : std::uint8_t { automatic, on, off };
PeerCopiesMode peer_copies_mode();

/// What all communicators that were split from one have in common. Thread-safe.
///
/// Memory that is given back is kept for the next who asks, because nobody tells when the others have closed it; sizes
/// are rounded up so that there are few. It is freed after all have left.
class PeerMemory : public std::enable_shared_from_this<PeerMemory> {
 public:
  /// Whether all ranks of `world` can open each other's memory on this GPU, worked out together: null where one cannot,
  /// or where DITATTN_PEER_COPIES says "off" on one. NotImplementedError, on all, where one says "on".
  static std::shared_ptr<PeerMemory> join(Communicator& world, int device);

  /// For the ranks of `world` together, where they go on without: memory must not be freed while others have it open.
  /// `memory` may be null.
  static void give_up(Communicator& world, std::shared_ptr<PeerMemory> memory);

  explicit PeerMemory(int device);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  /// Bytes, not initialised, that others may open; null where the GPU has none left.
  Tensor allocate(std::int64_t bytes);
  /// What a sender is told of a block to be received.
  [[nodiscard]] Destination locate(const void* data, std::int64_t bytes) const;
  /// Where another rank's block is for this process; opened when it comes first.
  [[nodiscard]] char* open(const Destination& destination);

  /// The first page is that of all ranks, by which they tell that they have left.
  void set_page(const std::shared_ptr<PeerPage>& page) { page_ = page_ ? page_ : page; }

 private:
  struct Block {
    char* data;
    std::int64_t bytes;
    cudaIpcMemHandle_t handle;
    bool is_used;
  };
  using Name = std::array<char, sizeof(cudaIpcMemHandle_t)>;
  class Lent;

  static void free_what_all_have_left();
  Block* find_free(std::int64_t bytes);
  void give_back(const void* data) noexcept;
  void close_all() noexcept;

  const int device_;
  mutable std::mutex mutex_;
  std::vector<Block> blocks_;
  std::map<Name, char*> opened_;
  std::shared_ptr<PeerPage> page_;
};

/// One value of each rank, on all.
template <class T>
std::vector<T> gather(Communicator& ranks, const T& mine) {
  std::vector<T> all(static_cast<std::size_t>(ranks.size()));
  const std::vector<std::int64_t> bytes(all.size(), sizeof(T));
  ranks.all_gather(&mine, all.data(), bytes)->wait();
  return all;
}

/// Calls `body` on every rank, and returns on all what it throws on the lowest rank where it does.
std::optional<std::string> first_problem(Communicator& ranks, const std::function<void()>& body);

}  // namespace ditattn::parallel
