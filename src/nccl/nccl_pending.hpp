#pragma once

/// What NCCL's batches end with, on the GPU and on the host.

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "ditattn/communicator.hpp"
#include "nccl/nccl_state.hpp"

namespace ditattn::parallel {

/// Here, in a stream of the device that is current.
std::shared_ptr<const Event> event_in(cudaStream_t stream);

/// On the GPU: the stream of the thread that waits goes on after `ended`.
class DevicePending final : public Pending {
 public:
  DevicePending(std::shared_ptr<NcclState> state, std::shared_ptr<const Event> ended)
      : state_(std::move(state)), ended_(std::move(ended)) {}
  void wait() override;

 private:
  std::shared_ptr<NcclState> state_;
  std::shared_ptr<const Event> ended_;
};

/// Device memory in a stream's order.
class Staging {
 public:
  Staging(std::int64_t bytes, cudaStream_t stream);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  [[nodiscard]] char* data() const { return static_cast<char*>(data_); }
  [[nodiscard]] cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_;
  void* data_ = nullptr;
};

/// From the host to the host, through the GPU's memory: what was received there is copied when it is waited for.
class HostPending final : public Pending {
 public:
  HostPending(std::shared_ptr<NcclState> state, std::shared_ptr<const Event> ended, std::unique_ptr<Staging> memory,
              std::vector<std::pair<ReceiveBlock, const char*>> received)
      : state_(std::move(state)),
        ended_(std::move(ended)),
        memory_(std::move(memory)),
        received_(std::move(received)) {}
  void wait() override;

 private:
  std::shared_ptr<NcclState> state_;
  std::shared_ptr<const Event> ended_;
  std::unique_ptr<Staging> memory_;
  std::vector<std::pair<ReceiveBlock, const char*>> received_;
};

}  // namespace ditattn::parallel
