// TORCH_SDPA: the semantics of torch.nn.functional.scaled_dot_product_attention, computed by the native engine.

#include <ditattn/backend.hpp>
#include <ditattn/cuda.hpp>

#include <string_view>

#include "backends/common/cpu_options.hpp"
#include "kernels/cpu/sdpa_native.hpp"
#ifdef DITATTN_CUDA
#include "kernels/cuda/sdpa_native.hpp"
#endif

namespace ditattn {
namespace {

constexpr CausalAlignment kAlignment = CausalAlignment::top_left;  // PyTorch's is_causal

class SDPAImpl : public AttentionImpl {
 public:
  explicit SDPAImpl(const ImplConfig& config)
      : AttentionImpl(config), threads_(thread_limit("TORCH_SDPA", config.backend_kwargs)) {}

  void run(const AttentionCall& call) const override {
    const KernelCall kernel = to_kernel_call(call, *this, kAlignment);
#ifdef DITATTN_CUDA
    const DLDevice device = call.query.device();
    if (device.device_type == kDLCUDA) {
      return kernels::cuda::sdpa_native(kernel.problem, {.device = device.device_id, .stream = current_stream(device)});
    }
#endif
    kernels::cpu::sdpa_native(kernel.problem, cpu_executor(threads_));
  }

 private:
  int threads_;
};

class SDPABackend : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "SDPA"; }

  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can = [] {
      Capabilities both = cpu_capabilities("native (PyTorch semantics)", kAlignment);
#ifdef DITATTN_CUDA
      both.devices.emplace_back("cuda");
      both.graph_safe = true;
#endif
      return both;
    }();
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
