#include <fmt/format.h>

#include <cstdlib>
#include <cstring>

#include "backends/common/cpu_problem.hpp"
#include "ditattn/errors.hpp"
#include "kernels/cpu/flash_attention.hpp"

namespace ditattn {

using kernels::cpu::CpuLevel;

namespace {

constexpr CausalAlignment kAlignment = CausalAlignment::bottom_right;

// The best level of this CPU, or the one DITATTN_CPU_LEVEL names if the CPU has it. Decided once.
CpuLevel choose_level() {
  const CpuLevel best = kernels::cpu::detect_cpu_level();
  const char* wanted = std::getenv("DITATTN_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level <= static_cast<int>(best); ++level) {
    if (std::strcmp(wanted, kernels::cpu::kCpuLevelNames[level]) == 0) return static_cast<CpuLevel>(level);
  }
  throw ValueError(fmt::format("DITATTN_CPU_LEVEL='{}' is not a level this CPU has: sse2 up to {}.", wanted,
                               kernels::cpu::kCpuLevelNames[static_cast<int>(best)]));
}

CpuLevel cpu_level() {
  static const CpuLevel level = choose_level();
  return level;
}

class FlashAttentionImpl final : public AttentionImpl {
 public:
  using AttentionImpl::AttentionImpl;
  void run(const AttentionCall& call) const override {
    const CpuCall cpu = to_cpu_call(call, *this, kAlignment);
    kernels::cpu::flash_attention(cpu.problem, cpu_executor(), cpu_level());
  }
};

}  // namespace

/// FLASH_ATTN on the CPU: our own exact tiled kernels (README.md).
class FlashAttentionBackend final : public AttentionBackend {
 public:
  FlashAttentionBackend()
      : capabilities_(cpu_capabilities(
            fmt::format("own tiled kernels, {}", kernels::cpu::kCpuLevelNames[static_cast<int>(cpu_level())]),
            kAlignment)) {}

  [[nodiscard]] std::string get_name() const override { return "FLASH_ATTN"; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<FlashAttentionImpl>(config);
  }

 private:
  Capabilities capabilities_;
};

BackendClass find_flash_attn(std::string_view class_name) {
  return class_name == "FlashAttentionBackend" ? std::make_shared<FlashAttentionBackend>() : nullptr;
}

}  // namespace ditattn
