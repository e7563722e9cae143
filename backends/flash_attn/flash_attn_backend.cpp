#include <fmt/format.h>

#include "backends/common/cpu_level_choice.hpp"
#include "backends/common/cpu_options.hpp"
#include "kernels/cpu/flash_attention.hpp"

namespace ditattn {

using kernels::cpu::CpuLevel;
using kernels::cpu::CpuUnits;

namespace {

constexpr CausalAlignment kAlignment = CausalAlignment::bottom_right;

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

class FlashAttentionImpl final : public AttentionImpl {
 public:
  explicit FlashAttentionImpl(const ImplConfig& config)
      : AttentionImpl(config), threads_(thread_limit("FLASH_ATTN", config.backend_kwargs)) {}

  void run(const AttentionCall& call) const override {
    const KernelCall cpu = to_kernel_call(call, *this, kAlignment);
    kernels::cpu::flash_attention(cpu.problem, cpu_executor(threads_), cpu_units());
  }

 private:
  int threads_;
};

}  // namespace

/// FLASH_ATTN on the CPU: our own exact tiled kernels (README.md).
class FlashAttentionBackend final : public AttentionBackend {
 public:
  FlashAttentionBackend() : capabilities_(cpu_capabilities(engine_name(), kAlignment)) {}

  [[nodiscard]] std::string get_name() const override { return "FLASH_ATTN"; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<FlashAttentionImpl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {kThreadsOption}; }

 private:
  Capabilities capabilities_;
};

BackendClass find_flash_attn(std::string_view class_name) {
  return class_name == "FlashAttentionBackend" ? std::make_shared<FlashAttentionBackend>() : nullptr;
}

}  // namespace ditattn
