// FLASH_ATTN: our own exact tiled kernels (README.md).

#include <ditattn/backend.hpp>
#include <ditattn/cuda.hpp>
#include <fmt/format.h>

#include <cstdlib>
#include <limits>
#include <string>
#include <string_view>

#include "backends/common/cpu_level_choice.hpp"
#include "backends/common/cpu_options.hpp"
#include "kernels/cpu/flash_attention.hpp"
#ifdef DITATTN_CUDA
#include "backends/common/gpu_level.hpp"
#include "kernels/cuda/flash_attention.hpp"
#include "kernels/cuda/flash_device.hpp"
#endif

namespace ditattn {

using kernels::cpu::CpuLevel;
using kernels::cpu::CpuUnits;

namespace {

constexpr CausalAlignment kAlignment = CausalAlignment::bottom_right;
#ifdef DITATTN_CUDA
constexpr std::int64_t kLargestGpuHeadSize = 256;
constexpr std::int64_t kMostAlignment = 16;  // that a problem tells
#endif

CpuUnits cpu_units() {
  // A level that is named is used whole, whether that is faster or not.
  static const CpuUnits units = kernels::cpu::choose_units(cpu_level().level, cpu_level().forced);
  return units;
}

std::string engine_name() {
  const CpuUnits units = cpu_units();
  const bool widened = units.level >= CpuLevel::avx512_bf16 && !units.bf16_dot;
  return fmt::format("own tiled kernels, {}{}", kernels::cpu::kCpuLevelNames[static_cast<int>(units.level)],
                     widened ? " (bfloat16 in float32, which is faster here)" : "");
}

#ifdef DITATTN_CUDA
// Contiguous tensors at an address of the problem's alignment, which nothing reads.
kernels::AttentionProblem to_kernel_problem(const Problem& problem) {
  const auto strides_of = [&](std::int64_t tokens, std::int64_t heads) {
    const std::int64_t sign = problem.alignment == 0 ? -1 : 1;
    return kernels::Strides{.batch = sign * tokens * heads * problem.head_size,
                            .token = sign * heads * problem.head_size,
                            .head = problem.head_size};
  };
  const auto* data = reinterpret_cast<const void*>(problem.alignment == 0 ? kMostAlignment : problem.alignment);
  kernels::AttentionProblem result;
  result.batch = problem.batch;
  result.heads = problem.num_heads;
  result.kv_heads = problem.num_kv_heads;
  result.rows = problem.seq_q;
  result.keys = problem.seq_kv;
  result.head_size = problem.head_size;
  result.type = result.out_type = element_type(problem.dtype);
  result.scale = 1;
  result.causal = problem.causal;
  result.num_queries = result.num_key_segments = 1;
  result.queries[0] = {.data = data, .strides = strides_of(problem.seq_q, problem.num_heads)};
  const kernels::Strides of_keys = strides_of(problem.seq_kv, problem.num_kv_heads);
  result.key_segments[0] = {
      .key = data, .value = data, .key_strides = of_keys, .value_strides = of_keys, .keys = problem.seq_kv, .mask = {}};
  result.out_strides = result.queries[0].strides;
  return result;
}
#endif

Capabilities find_capabilities() {
  Capabilities can = cpu_capabilities(engine_name(), kAlignment);
#ifdef DITATTN_CUDA
  can.engine += "; GPU: " + kernels::cuda::flash_kernels_built();
  can.devices.emplace_back("cuda");
  can.graph_safe = true;
#endif
  return can;
}

class FlashAttentionImpl final : public AttentionImpl {
 public:
  explicit FlashAttentionImpl(const ImplConfig& config)
      : AttentionImpl(config), threads_(thread_limit("FLASH_ATTN", config.backend_kwargs)) {}

  void run(const AttentionCall& call) const override {
    KernelCall kernel = to_kernel_call(call, *this, kAlignment);
#ifdef DITATTN_CUDA
    if (const DLDevice device = call.query.device(); device.device_type == kDLCUDA) {
      const auto length = kernel.plan.num_keys == 1 ? common_length(kernel.plan.keys[0]) : std::nullopt;
      if (length) drop_keys_from(kernel.problem, *length);
      return kernels::cuda::flash_attention(
          kernel.problem, {.device = device.device_id, .stream = current_stream(device)}, gpu_level());
    }
#endif
    kernels::cpu::flash_attention(kernel.problem, cpu_executor(threads_), cpu_units());
  }

 private:
  int threads_;
};

class FlashAttentionBackend final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "FLASH_ATTN"; }

  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }

#ifdef DITATTN_CUDA
  // GPUs take less than the CPU, of which the capabilities speak.
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    Verdict verdict = check_capabilities(get_name(), capabilities(), problem);
    if (problem.device.device_type != kDLCUDA) return verdict;
    const auto& devices = cuda_info().devices;
    const auto index = static_cast<std::size_t>(problem.device.device_id);
    if (index < devices.size() && devices[index].compute_capability < kernels::cuda::kAmpereCapability) {
      // The plain kernel would do, but a default would never move on from it.
      verdict.reasons.push_back(fmt::format(
          "FLASH_ATTN needs a GPU of compute capability 8.0 or more; {} has {}.{}. Select TORCH_SDPA.",
          device_name(problem.device), devices[index].compute_capability / 10, devices[index].compute_capability % 10));
    }
    if (problem.dtype == kFloat32) {
      verdict.reasons.emplace_back(
          "FLASH_ATTN does not support dtype=float32 on cuda. Supported dtypes there: float16, bfloat16. Select "
          "TORCH_SDPA or another backend.");
    }
    if (problem.head_size > kLargestGpuHeadSize) {
      verdict.reasons.push_back(
          fmt::format("FLASH_ATTN does not support head_size={} on cuda. Supported head sizes there: 1 to {}. Select "
                      "TORCH_SDPA or another backend.",
                      problem.head_size, kLargestGpuHeadSize));
    }
    return verdict;
  }

  [[nodiscard]] std::string kernel_name(const Problem& problem) const override {
    const auto& devices = cuda_info().devices;
    const auto index = static_cast<std::size_t>(problem.device.device_id);
    if (problem.device.device_type != kDLCUDA || index >= devices.size()) return {};
    return kernels::cuda::flash_kernel_name(to_kernel_problem(problem),
                                            static_cast<int>(devices[index].compute_capability), gpu_level());
  }
#endif

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<FlashAttentionImpl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {kThreadsOption}; }

 private:
  Capabilities capabilities_ = find_capabilities();
};

}  // namespace

BackendClass find_flash_attn(std::string_view class_name) {
  return class_name == "FlashAttentionBackend" ? std::make_shared<FlashAttentionBackend>() : nullptr;
}

}  // namespace ditattn
