#pragma once

/// What a communicator over NCCL and those split from it share.

#include <cuda_runtime.h>
#include <nccl.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "ditattn/communicator.hpp"
#include "nccl/peer_page.hpp"

namespace ditattn::parallel {

/// A point in a stream of the device that is current when it is made.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) const;
  void follow(cudaStream_t stream) const;  ///< what `stream` does next comes after it
  [[nodiscard]] bool passed() const;

 private:
  int device_ = 0;
  cudaEvent_t event_ = nullptr;
};

/// An operation on the GPU that the host does not wait for.
struct Watched {
  std::shared_ptr<const Event> began;
  std::shared_ptr<const Event> ended;
  std::string text;  ///< "rank 0 waits in exchange for rank 1"
};

class PeerMemory;

/// Keeps NCCL's handles, and has a thread that watches operations: NCCL's kernels, and streams that wait for a peer's
/// copy, wait for ever. One that has run longer than the timeout, an error that NCCL reports or a peer that gave up,
/// ends all of them: handles are aborted and flags poisoned, kernels and waits return, and everything asked for later
/// fails. Time that an operation waits for its turn in the stream does not count. Thread-safe.
class NcclState {
 public:
  NcclState(int device, Seconds timeout);
  ~NcclState();
  NcclState(const NcclState&) = delete;
  NcclState& operator=(const NcclState&) = delete;

  [[nodiscard]] int device() const { return device_; }
  [[nodiscard]] Seconds timeout() const { return timeout_; }

  /// Calls NCCL, not while handles are being aborted, and waits for what it does in the background, which is not the
  /// GPU's work. `handle` may be set by the call, and after it. `text`: as Watched's.
  void call(std::string_view what, const ncclComm_t& handle, const std::string& text,
            const std::function<ncclResult_t()>& function);

  /// Handles to be aborted with the others; `release`: no longer, and ended in order where it is ours, after what is
  /// under way.
  void keep(ncclComm_t handle);
  void release(ncclComm_t handle, bool ours) noexcept;

  /// Memory that ranks share, to be poisoned when one gives up.
  void keep(std::shared_ptr<PeerPage> page);
  void release(const std::shared_ptr<PeerPage>& page) noexcept;
  /// GPU memory that they may open; null where they cannot. Set before others know of this object.
  void set_memory(std::shared_ptr<PeerMemory> memory) { memory_ = std::move(memory); }
  [[nodiscard]] const std::shared_ptr<PeerMemory>& memory() const { return memory_; }

  void watch(Watched watched);
  /// Throws what has failed.
  void check();
  /// The first reason stays.
  void fail(bool late, const std::string& text) noexcept;
  /// That a rank did not come in time; `text` as Watched's.
  void fail_late(const std::string& text) noexcept;

 private:
  struct Running {
    Watched watched;
    std::optional<std::chrono::steady_clock::time_point> since;
  };

  void check_locked() const;
  void fail_locked(std::unique_lock<std::mutex>& lock, bool late, const std::string& text) noexcept;
  void hear_peers(std::unique_lock<std::mutex>& lock) noexcept;
  void poison_pages() noexcept;
  void abort_all(std::unique_lock<std::mutex>& lock) noexcept;
  [[nodiscard]] std::string late_text(const std::string& text) const;
  void run();
  void look_locked(std::unique_lock<std::mutex>& lock);

  const int device_;
  const Seconds timeout_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<ncclComm_t> handles_;
  std::vector<std::shared_ptr<PeerPage>> pages_;
  std::shared_ptr<PeerMemory> memory_;
  int calls_ = 0;  // of NCCL's functions, under way
  std::list<Running> running_;
  std::optional<std::string> failure_;
  bool late_ = false;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace ditattn::parallel
