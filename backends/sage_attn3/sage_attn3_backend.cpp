// SAGE_ATTN_3: microscaled FP4 attention after SageAttention 3 (README.md).

#include <fmt/format.h>

#include <string>
#include <string_view>

#include "backends/common/cpu_level_choice.hpp"
#include "backends/common/cpu_options.hpp"
#include "kernels/cpu/sage3_attention.hpp"
#ifdef DITATTN_CUDA
#include "backends/common/quantized_gpu.hpp"
#include "kernels/cuda/sage3_attention.hpp"
#endif

namespace ditattn {
namespace {

using kernels::cpu::CpuUnits;

constexpr CausalAlignment kAlignment = CausalAlignment::bottom_right;
constexpr const char* kName = "SAGE_ATTN_3";

// What `backend_kwargs` ask for. Throws ValueError for what is no value of an option.
struct Options {
  kernels::Sage3Smoothing smoothing;
  int threads;

  explicit Options(const BackendKwargs& kwargs) : threads(thread_limit(kName, kwargs)) {
    for (const auto& [name, value] : kwargs) {
      const std::string key(name);
      if (key == "smooth_q") smoothing.query = bool_option(kName, key, value);
      if (key == "smooth_k") smoothing.key = bool_option(kName, key, value);
      if (key == "smooth_v") smoothing.value = bool_option(kName, key, value);
    }
  }
};

CpuUnits cpu_units() {
  // A level that is named is used whole, whether that is faster or not.
  static const CpuUnits units = kernels::cpu::choose_units(cpu_level().level, cpu_level().forced);
  return units;
}

Capabilities find_capabilities() {
  const CpuUnits units = cpu_units();
  Capabilities can =
      cpu_capabilities(fmt::format("emulated NVFP4, {}{}", kernels::cpu::kCpuLevelNames[static_cast<int>(units.level)],
                                   units.bf16_dot ? ", products in bfloat16" : ""),
                       kAlignment);
  can.head_sizes = {.list = {}, .min = 1, .max = kernels::cpu::kSage3MostHeadSize};
  can.masks = {"padding", "spans"};
#ifdef DITATTN_CUDA
  if (const std::string built = kernels::cuda::sage3_kernels_built(); !built.empty()) {
    can.engine += "; GPU: " + built;
    can.devices.emplace_back("cuda");
    can.graph_safe = true;
  }
#endif
  return can;
}

class SageAttention3Impl final : public AttentionImpl {
 public:
  explicit SageAttention3Impl(const ImplConfig& config) : AttentionImpl(config), options_(config.backend_kwargs) {}

  void run(const AttentionCall& call) const override {
#ifdef DITATTN_CUDA
    if (const DLDevice device = call.query.device(); device.device_type == kDLCUDA) {
      const int capability = usable_capability(device).value();
      const KernelCall gpu = to_kernel_call(call, *this, kAlignment);
      const Scratch scratch(kernels::cuda::sage3_scratch_bytes(gpu.problem, capability), device);
      return kernels::cuda::sage3_attention(gpu.problem, options_.smoothing, capability, scratch.data(),
                                            {.device = device.device_id, .stream = current_stream(device)});
    }
#endif
    const KernelCall cpu = to_kernel_call(call, *this, kAlignment);
    kernels::cpu::sage3_attention(cpu.problem, cpu_executor(options_.threads), cpu_units(), options_.smoothing);
  }

 private:
  Options options_;
};

class SageAttention3Backend final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return kName; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }

#ifdef DITATTN_CUDA
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    Verdict verdict = check_capabilities(get_name(), capabilities(), problem);
    if (verdict) explain_quantized(get_name(), problem, kernel_name(problem), verdict);
    return verdict;
  }

  [[nodiscard]] std::string kernel_name(const Problem& problem) const override {
    const std::optional<int> capability = usable_capability(problem.device);
    if (!capability) return {};
    return kernels::cuda::sage3_kernel_name(problem.head_size, element_type(problem.dtype), *capability);
  }
#endif

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<SageAttention3Impl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override {
    return {"smooth_k", "smooth_q", "smooth_v", kThreadsOption};
  }

 private:
  Capabilities capabilities_ = find_capabilities();
};

}  // namespace

BackendClass find_sage_attn3(std::string_view class_name) {
  return class_name == "SageAttention3Backend" ? std::make_shared<SageAttention3Backend>() : nullptr;
}

}  // namespace ditattn
