// CUDNN_ATTN: cuDNN's fused attention through its graph API.

#include <ditattn/backend.hpp>
#include <ditattn/cuda.hpp>
#include <ditattn/errors.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>

#include "backends/common/cuda_engine.hpp"
#include "backends/common/joined_problem.hpp"
#include "backends/common/kernel_call.hpp"
#include "backends/cudnn_attn/fp8_parts.hpp"
#include "backends/cudnn_attn/sdpa_graph.hpp"
#include "kernels/cuda/engine_rows.hpp"

namespace ditattn {
namespace {

using kernels::AttentionProblem;

constexpr CausalAlignment kAlignment = CausalAlignment::top_left;  // as upstream runs it
constexpr std::int64_t kOldestComputeCapability = 80;
constexpr std::int64_t kHopper = 90;
constexpr std::int64_t kBlackwell = 100;
constexpr std::int64_t kPackedBeforeHopper = 91801;  // cuDNN 9.18.1
constexpr std::int64_t kFp8Since = 91300;            // with an output of 16 bits
constexpr std::int64_t kFp8MostHeadSize = 128;

constexpr std::int64_t kPackedStep = 128;  // what the longest of packed sequences is rounded up to

std::array<std::int64_t, 3> strides(const kernels::Strides& of) { return {of.batch, of.token, of.head}; }

constexpr const char* kAutotuneOption = "autotune";

// backend_kwargs["autotune"].
bool wants_autotune(const BackendKwargs& kwargs) {
  for (const auto& [key, value] : kwargs) {
    if (key != kAutotuneOption) continue;
    if (const auto wanted = value.as<bool>()) return *wanted;
    throw ValueError(
        fmt::format("CUDNN_ATTN: backend_kwargs['autotune'] is {}. Valid values are: true, false", option_text(value)));
  }
  return false;
}

class CuDNNAttentionImpl final : public AttentionImpl {
 public:
  explicit CuDNNAttentionImpl(const ImplConfig& config)
      : AttentionImpl(config), autotune_(wants_autotune(config.backend_kwargs)) {}

  void run(const AttentionCall& call) const override {
    const KernelCall kernel = to_kernel_call(call, *this, kAlignment);
    AttentionProblem problem = kernel.problem;
    const bool joint = kernel.plan.num_keys > 1;
    const auto length = joint ? std::nullopt : common_length(kernel.plan.keys[0]);
    if (length && *length != 1) drop_keys_from(problem, *length);  // one key alone cuDNN refuses
    const DLDevice device = call.query.device();
    const kernels::cuda::Launch launch{.device = device.device_id, .stream = current_stream(device)};
    const bool packed = kernel.plan.ranges != nullptr;
    const kernels::cuda::Sequences sequences = sequences_of(kernel.plan, device);
    if (problem.keys == 0 || (packed && sequences.count == 0)) return finish_rows(problem, launch);

    Parts parts;
    std::optional<JoinedProblem> joined;
    if (joint) problem = joined.emplace(kernel.problem, JoinedProblem::MaskType::additive, parts).problem();
    cudnn::SdpaSpec spec = spec_of(problem, device);
    spec.fp8 = call.metadata.defined() && call.metadata->wants_fp8_kv();
    const Fp8Parts fp8 = spec.fp8 ? Fp8Parts(spec, parts) : Fp8Parts();
    if (packed) take_sequences(spec, sequences, config().causal);
    spec.autotune = autotune_;
    const auto plan = plan_for(spec);
    const bool own_lse = problem.lse == nullptr || (!packed && is_contiguous_lse(problem));
    const kernels::cuda::BiasShape shape = kernels::cuda::bias_shape(problem);
    const bool masked = spec.bias_batch > 0;
    const std::int64_t bias_rows = masked ? shape.batch * shape.heads * shape.rows : 0;
    const bool as_it_lies = masked && is_bias(problem);
    const std::int64_t workspace = parts.add(plan->workspace_bytes());
    const std::int64_t lengths = parts.add(spec.lengths ? 2 * spec.batch * 4 : 0);
    const std::int64_t offsets = parts.add(packed ? 4 * (spec.batch + 1) * 8 : 0);
    const std::int64_t bias = parts.add(as_it_lies ? 0 : bias_rows * problem.keys * (spec.bias_float32 ? 4 : 2));
    const std::int64_t lse = parts.add(own_lse ? 0 : spec.batch * spec.heads * spec.rows * 4);
    const Scratch scratch(parts.total(), device);
    char* memory = scratch.data();
    if (joint) problem = joined->write(memory, launch);
    if (spec.fp8) fp8.write(problem, memory, launch);

    cudnn::SdpaPointers pointers{.query = problem.queries[0].data,
                                 .key = problem.key_segments[0].key,
                                 .value = problem.key_segments[0].value,
                                 .out = problem.out,
                                 .lse = own_lse ? problem.lse : reinterpret_cast<float*>(memory + lse),
                                 .workspace = memory + workspace};
    if (spec.fp8) fp8.point_to(memory, pointers);
    if (spec.lengths) {
      auto* query_lengths = reinterpret_cast<std::int32_t*>(memory + lengths);
      auto* key_lengths = query_lengths + spec.batch;
      auto* of_sequences = reinterpret_cast<std::int64_t*>(memory + offsets);
      if (packed) {
        write_sequences(problem, sequences, query_lengths, key_lengths, of_sequences, launch);
      } else {
        write_lengths(problem, query_lengths, key_lengths, launch);
      }
      pointers.query_lengths = query_lengths;
      pointers.key_lengths = key_lengths;
      pointers.offsets = of_sequences;
    }
    if (masked) {
      pointers.bias = as_it_lies ? problem.key_segments[0].mask.data : memory + bias;
      if (!as_it_lies) write_bias(problem, memory + bias, launch);
    }
    plan->run(pointers, launch.stream);
    if (!own_lse) {
      const kernels::Strides of_lse{.batch = spec.heads * spec.rows, .token = 1, .head = spec.rows};
      write_lse(problem, {.data = pointers.lse, .strides = of_lse, .sequences = sequences}, launch);
    }
    const bool empty_entries =
        joint ? problem.key_segments[0].lengths != nullptr : has_empty_entry(kernel.plan.keys[0]);
    if (masked || empty_entries || has_rows_without_keys(kernel.plan, problem)) finish_rows(problem, launch);
  }

 private:
  // Whether cuDNN can read the mask where it lies.
  static bool is_bias(const AttentionProblem& p) {
    const kernels::Mask& mask = p.key_segments[0].mask;
    return mask.type == kernels::cuda::bias_type(p) && mask.key_stride == 1 && mask.first_row == 0 &&
           mask.rows == p.rows && reinterpret_cast<std::uintptr_t>(mask.data) % 16 == 0 && mask.strides.batch >= 0 &&
           mask.strides.head >= 0 && mask.strides.token >= 0;
  }

  static bool has_empty_entry(const KeySegment& segment) {
    return segment.prefix != nullptr && std::ranges::any_of(segment.prefix->kv_lengths, [&](std::int64_t length) {
             return length - segment.length_offset <= 0;
           });
  }

  static bool is_contiguous_lse(const AttentionProblem& p) {
    const kernels::Strides& of = p.lse_strides;
    return of.token == 1 && (p.heads == 1 || of.head == p.rows) && (p.batch == 1 || of.batch == p.heads * p.rows);
  }

  // cuDNN's batch are the sequences. Its sizes are rounded up, so that fewer plans do for more packings, and so that no
  // size is 1, which cuDNN refuses or has other kernels for.
  static void take_sequences(cudnn::SdpaSpec& spec, const kernels::cuda::Sequences& sequences, bool causal) {
    const auto round_up = [](std::int64_t size) { return (size + kPackedStep - 1) / kPackedStep * kPackedStep; };
    spec.batch = sequences.count;
    spec.rows = round_up(sequences.longest_rows);
    spec.keys = round_up(sequences.longest_keys);
    spec.causal = causal;
    spec.lengths = spec.packed = true;
    for (auto* of : {&spec.query_strides, &spec.out_strides}) (*of)[0] = spec.rows * (*of)[1];
    for (auto* of : {&spec.key_strides, &spec.value_strides}) (*of)[0] = spec.keys * (*of)[1];
  }

  static cudnn::SdpaSpec spec_of(const AttentionProblem& p, DLDevice device) {
    const kernels::KeySegment& keys = p.key_segments[0];
    cudnn::SdpaSpec spec{.device = device.device_id,
                         .compute_capability = static_cast<int>(
                             cuda_info().devices[static_cast<std::size_t>(device.device_id)].compute_capability),
                         .bfloat16 = p.type == kernels::ElementType::bfloat16,
                         .batch = p.batch,
                         .heads = p.heads,
                         .kv_heads = p.kv_heads,
                         .rows = p.rows,
                         .keys = p.keys,
                         .head_size = p.head_size,
                         .query_strides = strides(p.queries[0].strides),
                         .key_strides = strides(keys.key_strides),
                         .value_strides = strides(keys.value_strides),
                         .out_strides = strides(p.out_strides),
                         .scale_bits = std::bit_cast<std::uint32_t>(p.scale),
                         .causal = p.causal,
                         .lengths = keys.lengths != nullptr,
                         .lse = p.lse != nullptr};
    if (keys.mask.data != nullptr) {
      const kernels::cuda::BiasShape shape = kernels::cuda::bias_shape(p);
      spec.bias_batch = shape.batch;
      spec.bias_heads = shape.heads;
      const std::int64_t of_head = shape.rows * p.keys;
      spec.bias_strides = is_bias(p) ? strides(keys.mask.strides)
                                     : std::array{shape.heads * of_head, shape.rows == 1 ? 0 : p.keys, of_head};
      spec.bias_float32 = kernels::cuda::bias_type(p) == kernels::ElementType::float32;
    }
    return spec;
  }

  // A layer sees the same problem in every step: the plan of its last call is at hand.
  std::shared_ptr<const cudnn::SdpaPlan> plan_for(const cudnn::SdpaSpec& spec) const {
    {
      const std::lock_guard lock(last_mutex_);
      if (last_plan_ != nullptr && last_spec_ == spec) return last_plan_;
    }
    auto plan = cudnn::sdpa_plan(spec);
    const std::lock_guard lock(last_mutex_);
    last_spec_ = spec;
    last_plan_ = plan;
    return plan;
  }

  bool autotune_;
  mutable std::mutex last_mutex_;
  mutable cudnn::SdpaSpec last_spec_;
  mutable std::shared_ptr<const cudnn::SdpaPlan> last_plan_;
};

std::string version_text() {
  const std::int64_t version = cudnn::version();
  if (version == 0) return "cuDNN";
  return fmt::format("cuDNN {}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

class CuDNNAttentionBackend final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "CUDNN_ATTN"; }

  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can = {.engine = version_text(),
                                     .devices = {"cuda"},
                                     .dtypes = {kFloat16, kBFloat16},
                                     .head_sizes = {.list = {}, .min = 8, .max = 256, .multiple = 8},
                                     .masks = {"padding", "bool", "additive"},
                                     .gqa = true,
                                     .causal = true,
                                     .causal_alignment = kAlignment,
                                     .lse = true,
                                     .packed = true,
                                     .joint = true,
                                     .fp8_kv = has_fp8(),
                                     .graph_safe = true,
                                     .masked_nan_propagates = true,
                                     .alignment = 16};
    return can;
  }

  void validate_available() const override {
    require_cuda(get_name(), kOldestComputeCapability);
    if (cudnn::version() == 0) {
      throw ImportError(
          fmt::format("CUDNN_ATTN needs cuDNN 9, which cannot be opened ({}). `ditattn doctor` says how to "
                      "have it.",
                      cudnn::problem()));
    }
  }

  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    Verdict verdict = check_capabilities(get_name(), capabilities(), problem);
    if (problem.seq_kv == 1) {
      verdict.reasons.emplace_back(
          "CUDNN_ATTN was explicitly selected but cuDNN FMHA does not support key/value sequence length 1. Select "
          "TORCH_SDPA or another backend for this shape.");
    }
    refuse_masked_packing(get_name(), problem, verdict);
    refuse_packing_before_hopper(problem, verdict);
    if (problem.fp8_kv && problem.device.device_type == kDLCUDA) explain_fp8(problem, verdict);
    return verdict;
  }

 private:
  static std::int64_t compute_capability(DLDevice device) {
    const auto& devices = cuda_info().devices;
    const auto index = static_cast<std::size_t>(device.device_id);
    return index < devices.size() ? devices[index].compute_capability : 0;
  }

  // Whether some GPU here has FP8 attention with an output of 16 bits.
  static bool has_fp8() {
    return cudnn::version() >= kFp8Since && std::ranges::any_of(cuda_info().devices, [](const CudaDevice& device) {
             return device.compute_capability >= kBlackwell;
           });
  }

  static void explain_fp8(const Problem& problem, Verdict& verdict) {
    const auto refuse = [&](const std::string& reason) {
      verdict.reasons.push_back("CUDNN_ATTN does not support kv_cache_dtype='fp8' " + reason);
    };
    if (compute_capability(problem.device) < kBlackwell) {
      verdict.reasons.emplace_back("cuDNN's FP8 attention gives FP8 output alone below compute capability 10.0.");
      return;
    }
    if (problem.head_size % 16 != 0 || problem.head_size > kFp8MostHeadSize) {
      refuse(fmt::format("with head_size={}. Supported head sizes: multiples of 16 to {}.", problem.head_size,
                         kFp8MostHeadSize));
    }
    if (problem.mask == MaskKind::boolean || problem.mask == MaskKind::additive) {
      refuse(fmt::format("with a mask of kind {}. Supported kinds: padding.", mask_kind_name(problem.mask)));
    }
    if (problem.packed) refuse("with packed sequences (cu_seqlens).");
  }

  // Older GPUs take packed sequences from a newer cuDNN on.
  static void refuse_packing_before_hopper(const Problem& problem, Verdict& verdict) {
    if (!problem.packed || problem.device.device_type != kDLCUDA) return;
    const std::int64_t here = compute_capability(problem.device);
    if (here == 0 || here >= kHopper || cudnn::version() >= kPackedBeforeHopper) return;
    verdict.reasons.push_back(
        fmt::format("CUDNN_ATTN does not support packed sequences (cu_seqlens) on compute capability {}.{} before "
                    "cuDNN 9.18.1, here is {}. Install a newer one.",
                    here / 10, here % 10, version_text()));
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    require_positive_scale(get_name(), config);
    return std::make_unique<CuDNNAttentionImpl>(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return {kAutotuneOption}; }
};

}  // namespace

BackendClass find_cudnn_attn(std::string_view class_name) {
  static const BackendClass backend = std::make_shared<CuDNNAttentionBackend>();
  return class_name == "CuDNNAttentionBackend" ? backend : nullptr;
}

}  // namespace ditattn
