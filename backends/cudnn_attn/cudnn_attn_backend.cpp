// CUDNN_ATTN: cuDNN's fused attention through its graph API.

#include <ditattn/backend.hpp>
#include <ditattn/cuda.hpp>
#include <ditattn/errors.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <mutex>
#include <string_view>

#include "backends/common/kernel_call.hpp"
#include "backends/cudnn_attn/sdpa_graph.hpp"
#include "kernels/cuda/engine_masks.hpp"

namespace ditattn {
namespace {

using kernels::AttentionProblem;

constexpr CausalAlignment kAlignment = CausalAlignment::top_left;  // as upstream runs it
constexpr std::int64_t kOldestComputeCapability = 80;

std::array<std::int64_t, 3> strides(const kernels::Strides& of) { return {of.batch, of.token, of.head}; }

// The scratch memory of a call, in parts that start at multiples of 256 bytes.
class Parts {
 public:
  std::int64_t add(std::int64_t bytes) {
    const std::int64_t start = total_;
    total_ += (bytes + 255) / 256 * 256;
    return start;
  }
  [[nodiscard]] std::int64_t total() const { return total_; }

 private:
  std::int64_t total_ = 0;
};

// Held while a call is queued: of two threads that share a stream, and with it the scratch memory, one goes first.
std::mutex& turn_in(void* stream) {
  static std::array<std::mutex, 64> turns;
  return turns[std::hash<void*>()(stream) / 64 % turns.size()];
}

bool has_empty_entry(const KeySegment& segment) {
  if (segment.keys == 0) return true;
  return segment.prefix != nullptr && std::ranges::any_of(segment.prefix->kv_lengths, [&](std::int64_t length) {
           return length - segment.length_offset <= 0;
         });
}

class CuDNNAttentionImpl final : public AttentionImpl {
 public:
  using AttentionImpl::AttentionImpl;

  void run(const AttentionCall& call) const override {
    const KernelCall kernel = to_kernel_call(call, *this, kAlignment);
    const AttentionProblem& problem = kernel.problem;
    const DLDevice device = call.query.device();
    const kernels::cuda::Launch launch{.device = device.device_id, .stream = current_stream(device)};
    if (problem.keys == 0) return finish_rows(problem, nullptr, nullptr, launch);

    const cudnn::SdpaSpec spec = spec_of(problem, device);
    const auto plan = cudnn::sdpa_plan(spec);
    const bool packed_lse = problem.lse == nullptr || is_packed(problem);
    Parts parts;
    const std::int64_t rows = problem.batch * problem.heads * problem.rows;
    const std::int64_t bias_rows = spec.bias_batch * spec.bias_heads * problem.rows;
    const std::int64_t workspace = parts.add(plan->workspace_bytes());
    const std::int64_t lengths = parts.add(spec.lengths ? 2 * problem.batch * 4 : 0);
    const std::int64_t bias = parts.add(bias_rows * problem.keys * 4);
    const std::int64_t empty_rows = parts.add(bias_rows);
    const std::int64_t lse = parts.add(packed_lse ? 0 : rows * 4);
    const std::lock_guard turn(turn_in(launch.stream));
    const Tensor memory_of_call = parts.total() > 0 ? scratch(parts.total(), device) : Tensor();
    char* memory = memory_of_call.defined() ? static_cast<char*>(memory_of_call.data_ptr()) : nullptr;

    cudnn::SdpaPointers pointers{.query = problem.queries[0].data,
                                 .key = problem.key_segments[0].key,
                                 .value = problem.key_segments[0].value,
                                 .out = problem.out,
                                 .lse = packed_lse ? problem.lse : reinterpret_cast<float*>(memory + lse),
                                 .workspace = memory + workspace};
    if (spec.lengths) {
      auto* query_lengths = reinterpret_cast<std::int32_t*>(memory + lengths);
      write_lengths(problem, query_lengths, query_lengths + problem.batch, launch);
      pointers.query_lengths = query_lengths;
      pointers.key_lengths = query_lengths + problem.batch;
    }
    std::uint8_t* flags = nullptr;
    if (spec.bias_batch > 0) {
      flags = reinterpret_cast<std::uint8_t*>(memory + empty_rows);
      auto* added = reinterpret_cast<float*>(memory + bias);
      write_bias(problem, added, flags, launch);
      pointers.bias = added;
    }
    plan->run(pointers, launch.stream);
    if (flags != nullptr || !packed_lse || has_empty_entry(kernel.plan.keys[0])) {
      finish_rows(problem, flags, packed_lse ? nullptr : pointers.lse, launch);
    }
  }

 private:
  static bool is_packed(const AttentionProblem& p) {
    const kernels::Strides& of = p.lse_strides;
    return of.token == 1 && (p.heads == 1 || of.head == p.rows) && (p.batch == 1 || of.batch == p.heads * p.rows);
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
    }
    return spec;
  }
};

class CuDNNAttentionBackend final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "CUDNN_ATTN"; }

  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can = {.engine = cudnn::version() == 0
                                                   ? "cuDNN"
                                                   : fmt::format("cuDNN {}.{}.{}", cudnn::version() / 10000,
                                                                 cudnn::version() / 100 % 100, cudnn::version() % 100),
                                     .devices = {"cuda"},
                                     .dtypes = {kFloat16, kBFloat16},
                                     .head_sizes = {.list = {}, .min = 8, .max = 256, .multiple = 8},
                                     .masks = {"padding", "bool", "additive"},
                                     .gqa = true,
                                     .causal = true,
                                     .causal_alignment = kAlignment,
                                     .lse = true,
                                     .graph_safe = true,
                                     .masked_nan_propagates = true,
                                     .alignment = 16};
    return can;
  }

  void validate_available() const override {
    if (cuda_info().devices.empty()) {
      throw ImportError(fmt::format("CUDNN_ATTN needs a CUDA device: {}.", cuda_info().reason));
    }
    const auto newest = std::ranges::max_element(cuda_info().devices, {}, &CudaDevice::compute_capability);
    if (newest->compute_capability < kOldestComputeCapability) {
      throw ImportError(fmt::format("CUDNN_ATTN needs compute capability 8.0, {} has {}.{}.", newest->name,
                                    newest->compute_capability / 10, newest->compute_capability % 10));
    }
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
    return verdict;
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    if (config.softmax_scale.value_or(1) <= 0) {
      throw ValueError(
          fmt::format("CUDNN_ATTN needs a softmax_scale above 0, got {}: cuDNN takes the largest product for "
                      "the largest logit. Select TORCH_SDPA or another backend.",
                      *config.softmax_scale));
    }
    return std::make_unique<CuDNNAttentionImpl>(config);
  }
};

}  // namespace

BackendClass find_cudnn_attn(std::string_view class_name) {
  static const BackendClass backend = std::make_shared<CuDNNAttentionBackend>();
  return class_name == "CuDNNAttentionBackend" ? backend : nullptr;
}

}  // namespace ditattn
