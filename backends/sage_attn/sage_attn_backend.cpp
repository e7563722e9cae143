// SAGE_ATTN: quantized attention after SageAttention 2 (README.md).

#include <ditattn/cuda.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>

#include "backends/common/cpu_level_choice.hpp"
#include "backends/common/cpu_options.hpp"
#include "kernels/cpu/sage_attention.hpp"
#ifdef DITATTN_CUDA
#include "backends/common/quantized_gpu.hpp"
#include "kernels/cuda/sage_attention.hpp"
#endif

namespace ditattn {
namespace {

using kernels::cpu::CpuLevel;

constexpr CausalAlignment kAlignment = CausalAlignment::bottom_right;

// What `backend_kwargs` ask for; what is not said follows from the device. Throws ValueError for what is no value of an
// option.
struct Options {
  std::optional<std::string> pv;
  std::optional<std::string> qk;
  std::optional<std::string> granularity;
  std::optional<bool> smooth_key;
  std::optional<bool> smooth_value;
  int threads;

  explicit Options(const BackendKwargs& kwargs) : threads(thread_limit("SAGE_ATTN", kwargs)) {
    for (const auto& [name, value] : kwargs) {
      const std::string key(name);
      if (key == "pv") {
        pv = one_of(
            key, value, {"fp8", "int8", "fp16"},
            R"("fp8" (the default of GPUs from compute capability 8.9 on), "int8" (the CPU's) or "fp16" (V keeps 16 bits))");
      }
      if (key == "qk") qk = one_of(key, value, {"int8", "fp8"}, R"("int8" (the default) or "fp8" (GPUs'))");
      if (key == "granularity") {
        granularity = one_of(key, value, {"per_thread", "per_warp"},
                             R"("per_thread" (the default; a scale for each row of Q) or "per_warp" (for 16))");
      }
      if (key == "smooth_k") smooth_key = bool_option("SAGE_ATTN", key, value);
      if (key == "smooth_v") smooth_value = bool_option("SAGE_ATTN", key, value);
    }
  }

  [[nodiscard]] kernels::cpu::SageOptions for_cpu() const {
    require(!pv || *pv != "fp8", "pv", "\"fp8\"", "the CPU", R"("int8" or "fp16")");
    require(!qk || *qk == "int8", "qk", "\"fp8\"", "the CPU", "\"int8\"");
    require(!granularity || *granularity == "per_thread", "granularity", "\"per_warp\"", "the CPU", "\"per_thread\"");
    require(!smooth_value.value_or(false), "smooth_v", "true", "the CPU", "false");
    return {.wide_values = pv && *pv == "fp16"};
  }

#ifdef DITATTN_CUDA
  // `capability`: of whose kernels may be used.
  [[nodiscard]] kernels::cuda::SageQuantization for_gpu(int capability) const {
    kernels::cuda::SageQuantization quantization = kernels::cuda::sage_defaults(capability);
    const bool has_fp8 = !quantization.wide_values;
    const char* gpus = has_fp8 ? "GPUs" : "GPUs below compute capability 8.9";
    const char* instead = has_fp8 ? R"("fp8" or "fp16")" : R"("fp16")";
    require(!pv || *pv == "fp16" || (has_fp8 && *pv == "fp8"), "pv", fmt::format("\"{}\"", pv.value_or("")), gpus,
            instead);
    if (pv) quantization.wide_values = *pv == "fp16";
    quantization.fp8_logits = qk && *qk == "fp8";
    require(!quantization.fp8_logits || has_fp8, "qk", "\"fp8\"", gpus, "\"int8\"");
    require(!quantization.fp8_logits || !quantization.wide_values, "qk", "\"fp8\"", R"(GPUs with pv="fp16")",
            "\"int8\"");
    quantization.per_thread = !granularity || *granularity == "per_thread";
    quantization.smooth_key = smooth_key.value_or(true);
    quantization.smooth_value = smooth_value.value_or(true);
    return quantization;
  }
#endif

 private:
  static std::string one_of(std::string_view key, const tvm::ffi::Any& value,
                            std::initializer_list<std::string_view> allowed, const char* explained) {
    const auto text = value.try_cast<tvm::ffi::String>();
    if (text && std::ranges::find(allowed, std::string_view(text->data(), text->size())) != allowed.end()) {
      return std::string(*text);
    }
    throw ValueError(
        fmt::format("SAGE_ATTN: backend_kwargs['{}'] is {}. It is {}.", key, option_text(value), explained));
  }
  static void require(bool holds, const char* key, const std::string& value, const char* device, const char* instead) {
    if (holds) return;
    throw ValueError(fmt::format("SAGE_ATTN: backend_kwargs['{}'] is {}, which there is not on {}. It is {} there.",
                                 key, value, device, instead));
  }
};

std::string engine_name() {
  const CpuLevel level = cpu_level().level;
  const char* bits = level == CpuLevel::avx2 || level == CpuLevel::avx512 ? "7 and 8 bits" : "8 bits";
  return fmt::format("own quantized kernels, {}, {}", kernels::cpu::kCpuLevelNames[static_cast<int>(level)], bits);
}

Capabilities sage_capabilities() {
  Capabilities can = cpu_capabilities(engine_name(), kAlignment);
  can.head_sizes = {.list = {}, .min = 1, .max = kernels::cpu::kSageMostHeadSize};
  can.masks = {"padding", "spans"};
#ifdef DITATTN_CUDA
  if (const std::string built = kernels::cuda::sage_kernels_built(); !built.empty()) {
    can.engine += "; GPU: " + built + ", int8 and e4m3 or float16";
    can.devices.emplace_back("cuda");
    can.graph_safe = true;
  }
#endif
  return can;
}

class SageAttentionImpl final : public AttentionImpl {
 public:
  explicit SageAttentionImpl(const ImplConfig& config) : AttentionImpl(config), options_(config.backend_kwargs) {}

  void run(const AttentionCall& call) const override {
#ifdef DITATTN_CUDA
    if (const DLDevice device = call.query.device(); device.device_type == kDLCUDA) {
      const int capability = usable_capability(device).value();
      const auto quantization = options_.for_gpu(capability);
      const KernelCall gpu = to_kernel_call(call, *this, kAlignment);
      const Scratch scratch(kernels::cuda::sage_scratch_bytes(gpu.problem, quantization, capability), device);
      return kernels::cuda::sage_attention(gpu.problem, quantization, capability, scratch.data(),
                                           {.device = device.device_id, .stream = current_stream(device)});
    }
#endif
    const auto options = options_.for_cpu();
    KernelCall cpu = to_kernel_call(call, *this, kAlignment);
    cpu.problem.smooth_key = options_.smooth_key.value_or(true);
    kernels::cpu::sage_attention(cpu.problem, cpu_executor(options_.threads), cpu_level().level, options);
  }

 private:
  Options options_;
};

class SageAttentionBackend final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "SAGE_ATTN"; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }

#ifdef DITATTN_CUDA
  // GPUs take less than the CPU, of which the capabilities speak.
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    Verdict verdict = check_capabilities(get_name(), capabilities(), problem);
    if (verdict) explain_quantized(get_name(), problem, kernel_name(problem), verdict);
    return verdict;
  }

  [[nodiscard]] std::string kernel_name(const Problem& problem) const override {
    const std::optional<int> capability = usable_capability(problem.device);
    if (!capability) return {};
    return kernels::cuda::sage_kernel_name(problem.head_size, element_type(problem.dtype), *capability);
  }
#endif

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<SageAttentionImpl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override {
    return {"granularity", "pv", "qk", "smooth_k", "smooth_v", kThreadsOption};
  }

 private:
  Capabilities capabilities_ = sage_capabilities();
};

}  // namespace

BackendClass find_sage_attn(std::string_view class_name) {
  return class_name == "SageAttentionBackend" ? std::make_shared<SageAttentionBackend>() : nullptr;
}

}  // namespace ditattn
