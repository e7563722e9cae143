#pragma once

/// NVIDIA GPUs. The driver (libcuda) is opened when something here is first asked for, so that one binary runs on
/// machines without it. All functions are thread-safe.

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "ditattn/export.hpp"
#include "ditattn/metadata.hpp"
#include "ditattn/tensor.hpp"

namespace ditattn {

/// One GPU.
struct CudaDevice {
  std::string name;                     ///< "NVIDIA H200"
  std::int64_t compute_capability = 0;  ///< 10 · major + minor: 90 for Hopper
  std::int64_t memory_bytes = 0;        ///< in all, not what is free
  std::int64_t multiprocessors = 0;     ///< how many
};

/// The GPUs of this machine, as far as this process sees them.
struct CudaInfo {
  std::vector<CudaDevice> devices;  ///< by ordinal, as `DLDevice::device_id` counts
  std::int64_t driver_version = 0;  ///< the newest CUDA that the driver knows, 13000 for 13.0; 0: no driver
  std::string reason;               ///< why there are no devices; empty if there are
};

/// What the driver shows, asked once per process; makes no context on any device.
DITATTN_API const CudaInfo& cuda_info();

/// Where this thread's work on `device` goes: the stream of tvm-ffi's environment (in Python PyTorch's current one),
/// or else the default stream, null. A cudaStream_t. Null for the CPU.
DITATTN_API void* current_stream(DLDevice device);

/// Waits for the work in this thread's stream of `device`. Nothing to wait for on the CPU.
DITATTN_API void synchronize(DLDevice device);

/// Scratch memory for work that this thread queues in its stream of a CUDA device. Kept per device and stream, where
/// calls follow on each other, as large as the largest; while the stream is captured, the graph's own. Threads that
/// share a stream take turns: one gets its memory when the other's object is gone, its work queued.
class DITATTN_API Scratch {
 public:
  /// `bytes` at least, not initialised; 0: none, and no turn. MemoryError where memory cannot be had.
  Scratch(std::int64_t bytes, DLDevice device);

  /// Starts at a multiple of 256 bytes; null if there is none.
  [[nodiscard]] char* data() const { return data_; }

 private:
  std::unique_lock<std::mutex> turn_;
  Tensor memory_;  // freed before the turn ends
  char* data_ = nullptr;
};

/// A copy of `tensor` on `device`, with the same strides; elements between its own come along. Ordered in this thread's
/// streams; waits where the host is on either side. ValueError for devices other than CPU and CUDA; MemoryError where
/// memory cannot be had.
DITATTN_API Tensor copy_to(const Tensor& tensor, DLDevice device);

/// The same metadata with its masks and joint tensors on `device`; what `extra` holds stays where it is.
DITATTN_API AttentionMetadata copy_to(const AttentionMetadata& metadata, DLDevice device);

}  // namespace ditattn
