#include "nccl/nccl_pending.hpp"

#include <algorithm>
#include <chrono>
#include <thread>

#include "ditattn/cuda.hpp"
#include "kernels/cuda/launch_impl.hpp"

namespace ditattn::parallel {

using kernels::cuda::check;
using kernels::cuda::OnDevice;

std::shared_ptr<const Event> event_in(cudaStream_t stream) {
  auto event = std::make_shared<Event>();
  event->record(stream);
  return event;
}

void DevicePending::wait() {
  state_->check();
  const OnDevice on_device(state_->device());
  ended_->follow(static_cast<cudaStream_t>(current_stream({kDLCUDA, state_->device()})));
}

Staging::Staging(std::int64_t bytes, cudaStream_t stream) : stream_(stream) {
  check(cudaMallocAsync(&data_, static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1)), stream), "cudaMallocAsync");
}

Staging::~Staging() { cudaFreeAsync(data_, stream_); }

void HostPending::wait() {
  const OnDevice on_device(state_->device());
  while (!ended_->passed()) {  // the state's thread sees to it that this ends
    state_->check();
    std::this_thread::sleep_for(std::chrono::microseconds(10));
  }
  state_->check();
  for (const auto& [block, from] : received_) {
    check(cudaMemcpyAsync(block.data, from, static_cast<std::size_t>(block.bytes), cudaMemcpyDeviceToHost,
                          memory_->stream()),
          "cudaMemcpyAsync");
  }
  check(cudaStreamSynchronize(memory_->stream()), "cudaStreamSynchronize");
}

}  // namespace ditattn::parallel
