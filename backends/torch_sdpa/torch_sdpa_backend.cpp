// TORCH_SDPA: the semantics of torch.nn.functional.scaled_dot_product_attention, computed by the native engine.

#include <ditattn/backend.hpp>

#include <string_view>

#include "backends/common/cpu_options.hpp"
#include "kernels/cpu/sdpa_native.hpp"

namespace ditattn {
namespace {

constexpr CausalAlignment kAlignment = CausalAlignment::top_left;  // PyTorch's is_causal

class SDPAImpl : public AttentionImpl {
 public:
  explicit SDPAImpl(const ImplConfig& config)
      : AttentionImpl(config), threads_(thread_limit("TORCH_SDPA", config.backend_kwargs)) {}

  void run(const AttentionCall& call) const override {
    const CpuCall cpu = to_cpu_call(call, *this, kAlignment);
    kernels::cpu::sdpa_native(cpu.problem, cpu_executor(threads_));
  }

 private:
  int threads_;
};

class SDPABackend : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "SDPA"; }

  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can = cpu_capabilities("native (PyTorch semantics)", kAlignment);
    return can;
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<SDPAImpl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {kThreadsOption}; }
};

}  // namespace

BackendClass find_torch_sdpa(std::string_view class_name) {
  static const BackendClass backend = std::make_shared<SDPABackend>();
  return class_name == "SDPABackend" ? backend : nullptr;
}

}  // namespace ditattn
