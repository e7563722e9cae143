// What goes between two GPUs beside the bytes: how long a stream of one takes to see what a stream of the other has
// written, with flags in host memory and in the memory of the GPU that waits; and copies by copy engines, alone and
// with flags around them, as src/nccl/peer_copies.hpp queues them.  Usage: ditattn_gpu_peer_flags

#include <cuda.h>
#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "bench/gpu/device_clock.hpp"

namespace {

using ditattn::bench::check;

constexpr int kRounds = 100;
constexpr int kRepeats = 7;

template <class Function>
Function driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
  return reinterpret_cast<Function>(found);
}

// Both GPUs' streams, a flag that each waits for, and a gate in host memory before what is timed, so that the host has
// queued it all.
struct Two {
  std::array<cudaStream_t, 2> streams{};
  std::array<CUdeviceptr, 2> flags{};
  volatile std::uint32_t* gate = nullptr;
  decltype(&cuStreamWaitValue32) wait_function = driver<decltype(wait_function)>("cuStreamWaitValue32");
  decltype(&cuStreamWriteValue32) write_function = driver<decltype(write_function)>("cuStreamWriteValue32");

  void wait(std::size_t gpu, std::uint32_t value) const { wait_at(gpu, flags[gpu], value); }
  void wait_at(std::size_t gpu, CUdeviceptr address, std::uint32_t value) const {
    check(wait_function(streams[gpu], address, value, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS ? cudaSuccess
                                                                                                : cudaErrorUnknown,
          "cuStreamWaitValue32");
  }
  // For the other to see.
  void write(std::size_t gpu, std::uint32_t value) const {
    check(write_function(streams[gpu], flags[1 - gpu], value, 0) == CUDA_SUCCESS ? cudaSuccess : cudaErrorUnknown,
          "cuStreamWriteValue32");
  }
  void use(std::size_t gpu) const { check(cudaSetDevice(static_cast<int>(gpu)), "cudaSetDevice"); }
};

// Microseconds per round of what `queue` queues on both GPUs, the median of some.
double time(const Two& two, const std::function<void(std::size_t gpu, std::uint32_t round)>& queue) {
  static std::uint32_t round = 0;  // flags and the gate only grow
  std::vector<double> times;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  two.use(0);
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const std::uint32_t opened = round + 1;
    for (std::size_t gpu = 0; gpu < 2; ++gpu) {
      two.use(gpu);
      two.wait_at(gpu, reinterpret_cast<CUdeviceptr>(two.gate), opened);
    }
    two.use(0);
    check(cudaEventRecord(begin, two.streams[0]), "cudaEventRecord");
    for (int i = 0; i < kRounds; ++i) {
      round += 2;
      for (std::size_t gpu = 0; gpu < 2; ++gpu) {
        two.use(gpu);
        queue(gpu, round);
      }
    }
    two.use(0);
    check(cudaEventRecord(end, two.streams[0]), "cudaEventRecord");
    *two.gate = opened;
    for (std::size_t gpu = 0; gpu < 2; ++gpu) check(cudaStreamSynchronize(two.streams[gpu]), "cudaStreamSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    times.push_back(1000 * ms / kRounds);
  }
  std::ranges::sort(times);
  return times[times.size() / 2];
}

void measure(const Two& two, const char* where) {
  const double both_ways = time(two, [&](std::size_t gpu, std::uint32_t round) {
    if (gpu == 0) two.write(0, round);
    two.wait(gpu, round);
    if (gpu == 1) two.write(1, round);
  });
  fmt::print("flags in {:<12} {:7.2f} us there and back\n", where, both_ways);
  for (const std::size_t bytes : {std::size_t{1} << 10, std::size_t{1} << 20, std::size_t{7} << 20,
                                  std::size_t{14} << 20, std::size_t{64} << 20}) {
    std::array<void*, 2> from{};
    std::array<void*, 2> to{};
    for (std::size_t gpu = 0; gpu < 2; ++gpu) {
      two.use(gpu);
      check(cudaMalloc(&from[gpu], bytes), "cudaMalloc");
      check(cudaMalloc(&to[gpu], bytes), "cudaMalloc");
    }
    const auto copy = [&](std::size_t gpu) {
      check(cudaMemcpyAsync(to[1 - gpu], from[gpu], bytes, cudaMemcpyDeviceToDevice, two.streams[gpu]),
            "cudaMemcpyAsync");
    };
    const double alone = time(two, [&](std::size_t gpu, std::uint32_t /*round*/) { copy(gpu); });
    const double flagged = time(two, [&](std::size_t gpu, std::uint32_t round) {
      two.write(gpu, round);
      two.wait(gpu, round);
      copy(gpu);
      two.write(gpu, round + 1);
      two.wait(gpu, round + 1);
    });
    const double within = time(two, [&](std::size_t gpu, std::uint32_t /*round*/) {
      check(cudaMemcpyAsync(to[gpu], from[gpu], bytes, cudaMemcpyDeviceToDevice, two.streams[gpu]), "cudaMemcpyAsync");
    });
    fmt::print("  {:>6} KiB to each other {:8.2f} us, {:6.1f} GB/s; with flags {:8.2f} us; within one GPU {:8.2f} us\n",
               bytes >> 10U, alone, static_cast<double>(bytes) / alone / 1e3, flagged, within);
    for (std::size_t gpu = 0; gpu < 2; ++gpu) {
      two.use(gpu);
      cudaFree(from[gpu]);
      cudaFree(to[gpu]);
    }
  }
}

}  // namespace

int main() try {
  int gpus = 0;
  check(cudaGetDeviceCount(&gpus), "cudaGetDeviceCount");
  if (gpus < 2) {
    fmt::print("skipped: {} CUDA devices, two are needed\n", gpus);
    return 77;
  }
  Two two;
  for (std::size_t gpu = 0; gpu < 2; ++gpu) {
    two.use(gpu);
    check(cudaDeviceEnablePeerAccess(static_cast<int>(1 - gpu), 0), "cudaDeviceEnablePeerAccess");
    check(cudaStreamCreateWithFlags(&two.streams[gpu], cudaStreamNonBlocking), "cudaStreamCreate");
  }
  constexpr std::size_t line = 64;
  void* on_host = nullptr;
  check(cudaHostAlloc(&on_host, 3 * line, cudaHostAllocMapped | cudaHostAllocPortable), "cudaHostAlloc");
  std::fill_n(static_cast<char*>(on_host), 3 * line, char{0});
  two.gate = reinterpret_cast<std::uint32_t*>(static_cast<char*>(on_host) + 2 * line);
  two.flags = {reinterpret_cast<CUdeviceptr>(on_host), reinterpret_cast<CUdeviceptr>(on_host) + line};
  measure(two, "host memory");
  for (std::size_t gpu = 0; gpu < 2; ++gpu) {
    void* on_gpu = nullptr;
    two.use(gpu);
    check(cudaMalloc(&on_gpu, line), "cudaMalloc");
    check(cudaMemset(on_gpu, 0, line), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    two.flags[gpu] = reinterpret_cast<CUdeviceptr>(on_gpu);
  }
  measure(two, "GPU memory");
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "{}\n", error.what());
  return 1;
}
