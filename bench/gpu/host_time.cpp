// The host's time to queue one call of CUDNN_ATTN, beside executing its cuDNN plan alone, and of FLASH_ATTN, beside
// launching an empty kernel: what checks, look-ups and scratch memory cost. C++ only; compare.py has Python's. And the
// GPU's time for it, from a graph of as many calls.

#include <ditattn/ditattn.hpp>
#include <fmt/format.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "backends/cudnn_attn/sdpa_graph.hpp"
#include "bench/gpu/device_clock.hpp"
#include "bench/gpu/empty_kernel.hpp"

namespace {

using ditattn::Tensor;
using ditattn::bench::check;

constexpr DLDevice kGpu{kDLCUDA, 0};
constexpr int kCalls = 100;
constexpr int kRounds = 31;

double host_microseconds(const std::function<void()>& call) {
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) call();
  const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return time.count() / kCalls;
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

}  // namespace

int main() try {
  if (ditattn::cuda_info().devices.empty()) {
    fmt::print(stderr, "no CUDA device: {}\n", ditattn::cuda_info().reason);
    return 1;
  }
  const auto& gpu = ditattn::cuda_info().devices[0];
  fmt::print("{}, medians of {} rounds of {} calls, microseconds per call\n", gpu.name, kRounds, kCalls);
  const ditattn::bench::Clock clock;
  TVMFFIEnvSetStream(kGpu.device_type, kGpu.device_id, clock.stream(), nullptr);
  for (const auto& [batch, heads, rows, head_size] : {std::array<std::int64_t, 4>{1, 8, 128, 64}, {2, 16, 1024, 72}}) {
    const std::array shape{batch, rows, heads, head_size};
    std::vector<Tensor> tensors;
    for (int i = 0; i < 4; ++i) {
      tensors.push_back(ditattn::empty(shape, ditattn::kBFloat16, kGpu));
      check(cudaMemset(tensors.back().data_ptr(), 0, tvm::ffi::GetDataSize(*tensors.back().GetDLTensorPtr())),
            "cudaMemset");
    }
    const auto attention = ditattn::DiffusionAttentionBackendEnum::CUDNN_ATTN.get_class()->make(
        {.num_heads = heads, .head_size = head_size});
    const std::array<std::int64_t, 3> strides{rows * heads * head_size, heads * head_size, head_size};
    const auto plan = ditattn::cudnn::sdpa_plan(
        {.device = 0,
         .compute_capability = static_cast<int>(gpu.compute_capability),
         .bfloat16 = true,
         .batch = batch,
         .heads = heads,
         .kv_heads = heads,
         .rows = rows,
         .keys = rows,
         .head_size = head_size,
         .query_strides = strides,
         .key_strides = strides,
         .value_strides = strides,
         .out_strides = strides,
         .scale_bits = std::bit_cast<std::uint32_t>(static_cast<float>(attention->softmax_scale()))});
    const Tensor workspace = ditattn::empty(std::array{plan->workspace_bytes() + 1}, ditattn::kBool, kGpu);
    const ditattn::cudnn::SdpaPointers pointers{.query = tensors[0].data_ptr(),
                                                .key = tensors[1].data_ptr(),
                                                .value = tensors[2].data_ptr(),
                                                .out = tensors[3].data_ptr(),
                                                .workspace = workspace.data_ptr()};
    const auto flash = ditattn::DiffusionAttentionBackendEnum::FLASH_ATTN.get_class()->make(
        {.num_heads = heads, .head_size = head_size});
    const auto forward_of = [&](const auto& impl) {
      return [&] { impl->forward(tensors[0], tensors[1], tensors[2], {}, {.out = tensors[3]}); };
    };
    const std::array<std::function<void()>, 4> calls{forward_of(attention),
                                                     [&] { plan->run(pointers, clock.stream()); }, forward_of(flash),
                                                     [&] { launch_empty_kernel(clock.stream()); }};
    for (const auto& call : calls) call();  // makes what is kept
    std::array<ditattn::bench::Graph, calls.size()> graphs;
    for (std::size_t i = 0; i < calls.size(); ++i) {
      graphs[i] = ditattn::bench::Graph(clock, [&] {
        for (int call = 0; call < kCalls; ++call) calls[i]();
      });
    }
    std::array<std::vector<double>, calls.size()> host_times;
    std::array<std::vector<double>, calls.size()> gpu_times;
    for (int round = 0; round < kRounds; ++round) {
      for (std::size_t i = 0; i < calls.size(); ++i) {
        host_times[i].push_back(host_microseconds(calls[i]));
        gpu_times[i].push_back(1000 * graphs[i].milliseconds(clock) / kCalls);
      }
    }
    fmt::print("  {},{},{},{},{}\n", batch, heads, rows, rows, head_size);
    const auto compare = [&](const char* what, const auto& times, std::size_t ours, const char* name,
                             const char* other) {
      const double forward = median(times[ours]);
      const double bare = median(times[ours + 1]);
      fmt::print("    {}: {} {:.2f}, {} {:.2f}, difference {:.2f}\n", what, name, forward, other, bare, forward - bare);
    };
    compare("host", host_times, 0, "CUDNN_ATTN", "the plan alone");
    compare("host", host_times, 2, "FLASH_ATTN", "an empty kernel");
    compare("GPU, in a graph", gpu_times, 0, "CUDNN_ATTN", "the plan alone");
    compare("GPU, in a graph", gpu_times, 2, "FLASH_ATTN", "an empty kernel");
  }
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "ditattn_gpu_host_time: {}\n", error.what());
  return 1;
}
