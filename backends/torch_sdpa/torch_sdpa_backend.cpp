// TORCH_SDPA: the semantics of torch.nn.functional.scaled_dot_product_attention, computed by PyTorch where it is there
// and takes the call, else by the native engine.

#include <ditattn/backend.hpp>
#include <ditattn/cuda.hpp>
#include <ditattn/errors.hpp>
#include <fmt/format.h>

#include <optional>
#include <string_view>

#include "backends/common/cpu_options.hpp"
#include "backends/torch_sdpa/aten_engine.hpp"
#include "kernels/cpu/sdpa_native.hpp"
#ifdef DITATTN_CUDA
#include "kernels/cuda/engine_rows.hpp"
#include "kernels/cuda/sdpa_native.hpp"
#endif

namespace ditattn {
namespace {

using kernels::AttentionProblem;

constexpr CausalAlignment kAlignment = CausalAlignment::top_left;  // PyTorch's is_causal

constexpr const char* kEngineOption = "engine";

enum class Engine : std::uint8_t { automatic, aten, native };

// backend_kwargs["engine"].
Engine engine_choice(const BackendKwargs& kwargs) {
  for (const auto& [key, value] : kwargs) {
    if (key != kEngineOption) continue;
    const std::string text = option_text(value);
    if (text == "'auto'") return Engine::automatic;
    if (text == "'native'") return Engine::native;
    if (text != "'aten'") {
      throw ValueError(
          fmt::format("TORCH_SDPA: backend_kwargs['engine'] is {}. Valid values are: 'auto', 'aten', 'native'", text));
    }
    if (!aten::version().empty()) return Engine::aten;
    throw ValueError(fmt::format(
        "TORCH_SDPA: backend_kwargs['engine'] is 'aten', but there is no PyTorch to be had ({}). Import torch "
        "first, put its lib folder on LD_LIBRARY_PATH, or give 'native'.",
        aten::problem()));
  }
  return Engine::automatic;
}

// The mask that the lengths were found in, element by element.
std::optional<kernels::Mask> given_mask(const AttentionMetadata& metadata, const AttentionProblem& problem) {
  if (!metadata.defined() || !metadata->fields.attn_mask.has_value()) return std::nullopt;
  const Tensor mask = metadata->fields.attn_mask.value();
  if (mask.ndim() != 2 || mask.size(1) < problem.keys) return std::nullopt;
  return kernels::Mask{.data = data_pointer(mask),
                       .type = element_type(mask.dtype()),
                       .strides = {.batch = mask.size(0) == 1 ? 0 : mask.stride(0)},
                       .key_stride = mask.stride(1),
                       .rows = problem.rows};
}

class SDPAImpl : public AttentionImpl {
 public:
  explicit SDPAImpl(const ImplConfig& config)
      : AttentionImpl(config),
        threads_(thread_limit("TORCH_SDPA", config.backend_kwargs)),
        engine_(engine_choice(config.backend_kwargs)) {}

  void run(const AttentionCall& call) const override {
    const KernelCall kernel = to_kernel_call(call, *this, kAlignment);
    const DLDevice device = call.query.device();
    const bool on_gpu = device.device_type == kDLCUDA;
    if (engine_ == Engine::aten || (engine_ == Engine::automatic && (on_gpu || threads_ == 0))) {
      if (run_aten(call, kernel, {.cuda_device = on_gpu ? device.device_id : -1, .stream = current_stream(device)}))
        return;
      if (engine_ == Engine::aten) {
        throw NotImplementedError(
            "TORCH_SDPA: PyTorch does not take this call as it lies (LSE, spans, packed sequences, joint tokens, "
            "causal with a mask, a mask of another dtype, a scale that is not above 0, negative strides; on a GPU "
            "starts or strides that are no multiples of 16 bytes). Leave backend_kwargs['engine'] out, or give "
            "'native'.");
      }
    }
#ifdef DITATTN_CUDA
    if (on_gpu) {
      return kernels::cuda::sdpa_native(kernel.problem, {.device = device.device_id, .stream = current_stream(device)});
    }
#endif
    kernels::cpu::sdpa_native(kernel.problem, cpu_executor(threads_));
  }

 private:
  static bool run_aten(const AttentionCall& call, const KernelCall& kernel, const aten::Place& place) {
    AttentionProblem problem = kernel.problem;
    if (kernel.plan.num_keys == 1) {
      if (const auto length = common_length(kernel.plan.keys[0])) {
        drop_keys_from(problem, *length);
      } else if (problem.key_segments[0].lengths != nullptr) {
        if (const auto mask = given_mask(call.metadata, problem)) {
          problem.key_segments[0].mask = *mask;
          problem.key_segments[0].lengths = nullptr;
        }
      }
    }
    if (!aten::takes(problem, place)) return false;
    aten::attention(problem, place);
#ifdef DITATTN_CUDA
    if (place.cuda_device >= 0 && problem.key_segments[0].mask.data != nullptr) {
      kernels::cuda::finish_rows(problem, {.device = call.query.device().device_id, .stream = place.stream});
    }
#endif
    return true;
  }

  int threads_;
  Engine engine_;
};

class SDPABackend : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "SDPA"; }

  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can = [] {
      const std::string& pytorch = aten::version();
      Capabilities both =
          cpu_capabilities(pytorch.empty() ? "native (PyTorch semantics)" : "aten " + pytorch, kAlignment);
      both.masked_nan_propagates = !pytorch.empty();
#ifdef DITATTN_CUDA
      both.devices.emplace_back("cuda");
      both.graph_safe = true;
#endif
      return both;
    }();
    return can;
  }

  // What `aten::takes` says, as far as a problem tells.
  [[nodiscard]] std::string kernel_name(const Problem& problem) const override {
    const std::string& pytorch = aten::version();
    if (pytorch.empty()) return {};
    const bool on_gpu = problem.device.device_type == kDLCUDA;
    const char* left_out = problem.joint                                      ? "joint tokens"
                           : problem.packed                                   ? "packed sequences"
                           : problem.spans                                    ? "spans"
                           : problem.lse                                      ? "calls that want an LSE"
                           : problem.causal && problem.mask != MaskKind::none ? "causal with a mask"
                           : on_gpu && problem.alignment < 16                 ? "tensors that lie like these"
                           : problem.alignment == 0                           ? "negative strides"
                                                                              : nullptr;
    return left_out == nullptr ? "aten " + pytorch : fmt::format("native: PyTorch does not take {}", left_out);
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return std::make_unique<SDPAImpl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {kThreadsOption, kEngineOption}; }
};

}  // namespace

BackendClass find_torch_sdpa(std::string_view class_name) {
  static const BackendClass backend = std::make_shared<SDPABackend>();
  return class_name == "SDPABackend" ? backend : nullptr;
}

}  // namespace ditattn
