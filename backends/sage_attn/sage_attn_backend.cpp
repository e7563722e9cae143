// SAGE_ATTN on the CPU: quantized attention after SageAttention 2 (README.md).

#include <fmt/format.h>

#include "backends/common/cpu_level_choice.hpp"
#include "backends/common/cpu_options.hpp"
#include "kernels/cpu/sage_attention.hpp"

namespace ditattn {
namespace {

using kernels::cpu::CpuLevel;
using kernels::cpu::SageOptions;

constexpr CausalAlignment kAlignment = CausalAlignment::bottom_right;

// What `backend_kwargs` ask for. Throws ValueError for what is no value of an option.
struct Options {
  SageOptions kernel;
  bool smooth_key = true;
  int threads;

  explicit Options(const BackendKwargs& kwargs) : threads(thread_limit("SAGE_ATTN", kwargs)) {
    for (const auto& [key, value] : kwargs) {
      if (key == "pv") kernel.wide_values = parse_pv(value);
      if (key == "smooth_k") smooth_key = parse_smooth(value);
    }
  }

 private:
  static bool parse_pv(const tvm::ffi::Any& value) {
    const auto text = value.try_cast<tvm::ffi::String>();
    if (text && *text == "int8") return false;
    if (text && *text == "fp16") return true;
    throw ValueError(
        fmt::format("SAGE_ATTN: backend_kwargs['pv'] is {}. On the CPU it is \"int8\" (the default) or "
                    "\"fp16\" (V keeps 16 bits).",
                    option_text(value)));
  }
  static bool parse_smooth(const tvm::ffi::Any& value) {
    if (const auto smooth = value.try_cast<bool>()) return *smooth;
    throw ValueError(
        fmt::format("SAGE_ATTN: backend_kwargs['smooth_k'] is {}, not a boolean: true (the default) or false.",
                    option_text(value)));
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
  return can;
}

class SageAttentionImpl final : public AttentionImpl {
 public:
  explicit SageAttentionImpl(const ImplConfig& config) : AttentionImpl(config), options_(config.backend_kwargs) {}

  void run(const AttentionCall& call) const override {
    KernelCall cpu = to_kernel_call(call, *this, kAlignment);
    cpu.problem.smooth_key = options_.smooth_key;
    kernels::cpu::sage_attention(cpu.problem, cpu_executor(options_.threads), cpu_level().level, options_.kernel);
  }

 private:
  Options options_;
};

class SageAttentionBackend final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "SAGE_ATTN"; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<SageAttentionImpl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {"pv", "smooth_k", kThreadsOption}; }

 private:
  Capabilities capabilities_ = sage_capabilities();
};

}  // namespace

BackendClass find_sage_attn(std::string_view class_name) {
  return class_name == "SageAttentionBackend" ? std::make_shared<SageAttentionBackend>() : nullptr;
}

}  // namespace ditattn
