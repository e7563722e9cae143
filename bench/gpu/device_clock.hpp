#pragma once

/// Times on a GPU, for the programs of this folder. Errors of CUDA are exceptions.

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <memory>
#include <stdexcept>
#include <type_traits>

namespace ditattn::bench {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(
      fmt::format("{} failed: {} ({})", what, cudaGetErrorString(status), cudaGetErrorName(status)));
}

struct Destroy {
  void operator()(void* memory) const { cudaFree(memory); }
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

/// A stream of the current device and the time that passes in it.
class Clock {
 public:
  Clock() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    stream_.reset(stream);
    for (Owned<cudaEvent_t>* owned : {&start_, &end_}) {
      cudaEvent_t event = nullptr;
      check(cudaEventCreate(&event), "cudaEventCreate");
      owned->reset(event);
    }
  }

  cudaStream_t stream() const { return stream_.get(); }

  template <class Queue>
  float milliseconds(const Queue& queue) const {
    check(cudaEventRecord(start_.get(), stream()), "cudaEventRecord");
    queue();
    check(cudaEventRecord(end_.get(), stream()), "cudaEventRecord");
    check(cudaEventSynchronize(end_.get()), "cudaEventSynchronize");
    float time = 0;
    check(cudaEventElapsedTime(&time, start_.get(), end_.get()), "cudaEventElapsedTime");
    return time;
  }

 private:
  Owned<cudaStream_t> stream_;
  Owned<cudaEvent_t> start_;
  Owned<cudaEvent_t> end_;
};

/// The work that `queue` captures into a stream, to be queued again as a whole.
class Graph {
 public:
  Graph() = default;

  template <class Queue>
  Graph(const Clock& clock, const Queue& queue) {
    check(cudaStreamBeginCapture(clock.stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    queue();
    cudaGraph_t captured = nullptr;
    check(cudaStreamEndCapture(clock.stream(), &captured), "cudaStreamEndCapture");
    const Owned<cudaGraph_t> owned(captured);
    cudaGraphExec_t instance = nullptr;
    check(cudaGraphInstantiate(&instance, captured, 0), "cudaGraphInstantiate");
    graph_.reset(instance);
  }

  /// Of one replay.
  float milliseconds(const Clock& clock) const {
    return clock.milliseconds([&] { check(cudaGraphLaunch(graph_.get(), clock.stream()), "cudaGraphLaunch"); });
  }

 private:
  Owned<cudaGraphExec_t> graph_;
};

}  // namespace ditattn::bench
