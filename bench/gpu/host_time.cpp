// The host's time to queue one call of CUDNN_ATTN, beside executing its cuDNN plan alone, and of FLASH_ATTN, beside
// launching an empty kernel: what checks, look-ups and scratch memory cost. C++ only; compare.py has Python's.

#include <cuda_runtime.h>
#include <ditattn/ditattn.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "backends/cudnn_attn/sdpa_graph.hpp"
#include "bench/gpu/empty_kernel.hpp"

namespace {

using ditattn::Tensor;

constexpr DLDevice kGpu{kDLCUDA, 0};
constexpr int kCalls = 100;
constexpr int kRounds = 31;

double microseconds(const std::function<void()>& call) {
  cudaDeviceSynchronize();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) call();
  const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
  cudaDeviceSynchronize();
  return time.count() / kCalls;
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

}  // namespace

int main() {
  if (ditattn::cuda_info().devices.empty()) {
    fmt::print(stderr, "no CUDA device: {}\n", ditattn::cuda_info().reason);
    return 1;
  }
  const auto& gpu = ditattn::cuda_info().devices[0];
  fmt::print("{}, medians of {} rounds of {} calls, microseconds of the host per call\n", gpu.name, kRounds, kCalls);
  for (const auto& [batch, heads, rows, head_size] : {std::array<std::int64_t, 4>{1, 8, 128, 64}, {2, 16, 1024, 72}}) {
    const std::array shape{batch, rows, heads, head_size};
    std::vector<Tensor> tensors;
    for (int i = 0; i < 4; ++i) {
      tensors.push_back(ditattn::empty(shape, ditattn::kBFloat16, kGpu));
      cudaMemset(tensors.back().data_ptr(), 0, tvm::ffi::GetDataSize(*tensors.back().GetDLTensorPtr()));
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
    const std::array<std::function<void()>, 4> calls{forward_of(attention), [&] { plan->run(pointers, nullptr); },
                                                     forward_of(flash), launch_empty_kernel};
    std::array<std::vector<double>, calls.size()> times;
    for (int round = 0; round < kRounds + 1; ++round) {
      for (std::size_t i = 0; i < calls.size(); ++i) {
        const double time = microseconds(calls[i]);
        if (round != 0) times[i].push_back(time);  // plans were built in the first
      }
    }
    const std::string label = fmt::format("{},{},{},{},{}", batch, heads, rows, rows, head_size);
    const auto compare = [&](const char* name, std::size_t ours, const char* other) {
      const double forward = median(times[ours]);
      const double bare = median(times[ours + 1]);
      fmt::print("  {}: {} {:.2f}, {} {:.2f}, difference {:.2f}\n", label, name, forward, other, bare, forward - bare);
    };
    compare("CUDNN_ATTN", 0, "the plan alone");
    compare("FLASH_ATTN", 2, "an empty kernel");
  }
}
