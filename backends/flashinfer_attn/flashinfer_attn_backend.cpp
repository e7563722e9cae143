// FLASHINFER_ATTN: FlashInfer's prefill kernels, compiled ahead of time.

#include <ditattn/backend.hpp>
#include <ditattn/cuda.hpp>
#include <ditattn/errors.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "backends/common/cuda_engine.hpp"
#include "backends/common/joined_problem.hpp"
#include "backends/common/kernel_call.hpp"
#include "backends/flashinfer_attn/prefill.hpp"
#include "kernels/cuda/engine_rows.hpp"

namespace ditattn {
namespace {

using flashinfer_attn::BuiltPrefill;
using flashinfer_attn::Engine;
using flashinfer_attn::Masking;
using flashinfer_attn::PrefillMemory;
using kernels::AttentionProblem;
using kernels::Strides;

constexpr CausalAlignment kAlignment = CausalAlignment::bottom_right;
constexpr std::int64_t kOldestComputeCapability = 80;
constexpr std::int64_t kHopper = 90;
constexpr std::int64_t kElementBytes = 2;
constexpr std::int64_t kFa2Extent = std::int64_t{1} << 32;       // it counts elements in 32 bits
constexpr std::int64_t kHopperStride = (std::int64_t{1} << 39);  // TMA: below 2^40 bytes
constexpr std::int64_t kTokenLimit = (std::int64_t{1} << 31) - 1;
constexpr std::int64_t kGridLimit = 65535;  // of blocks in y and z
constexpr float kLn2 = 0.693147181F;

Masking masking_of(const AttentionProblem& p) {
  const kernels::KeySegment& keys = p.key_segments[0];
  if (keys.mask.data != nullptr || (p.causal && keys.lengths != nullptr)) return Masking::custom;
  return p.causal ? Masking::causal : Masking::none;
}

// TMA takes no stride of 0.
bool tma_takes(const Strides& strides) {
  const auto takes = [](std::int64_t stride) { return stride > 0 && stride < kHopperStride; };
  return takes(strides.token) && takes(strides.head);
}

bool hopper_takes(const AttentionProblem& p) {
  const kernels::KeySegment& keys = p.key_segments[0];
  return masking_of(p) != Masking::custom && p.heads <= kGridLimit && p.batch <= kGridLimit &&
         tma_takes(p.queries[0].strides) && tma_takes(keys.key_strides) && tma_takes(keys.value_strides);
}

const BuiltPrefill* find_prefill(const AttentionProblem& p, Engine engine) {
  const auto built = flashinfer_attn::built_prefills();
  const auto found = std::ranges::find_if(built, [&](const BuiltPrefill& one) {
    return one.engine == engine && one.head_size == p.head_size && one.type == p.type && one.masking == masking_of(p);
  });
  return found == built.end() ? nullptr : &*found;
}

const BuiltPrefill& choose_prefill(const AttentionProblem& p, int device) {
  if (cuda_info().devices[static_cast<std::size_t>(device)].compute_capability == kHopper && hopper_takes(p)) {
    if (const BuiltPrefill* hopper = find_prefill(p, Engine::hopper)) return *hopper;
  }
  return *find_prefill(p, Engine::fa2);
}

// Batch entries that follow each other go into one launch.
bool follow_each_other(const AttentionProblem& p) {
  const auto dense = [](const Strides& strides, std::int64_t tokens) {
    return strides.batch == tokens * strides.token;
  };
  const kernels::KeySegment& keys = p.key_segments[0];
  return p.batch == 1 ||
         (dense(p.queries[0].strides, p.rows) && dense(keys.key_strides, p.keys) && dense(keys.value_strides, p.keys));
}

// Elements from the first to the last that a launch over `p` reads from one of Q, K and V, at most.
std::int64_t extent(const AttentionProblem& p) {
  const auto reach = [&](const Strides& strides, std::int64_t tokens, std::int64_t heads) {
    return p.batch * tokens * strides.token + heads * strides.head;
  };
  const kernels::KeySegment& keys = p.key_segments[0];
  return std::max({reach(p.queries[0].strides, p.rows, p.heads), reach(keys.key_strides, p.keys, p.kv_heads),
                   reach(keys.value_strides, p.keys, p.kv_heads)});
}

const void* advance(const void* data, std::int64_t elements, std::int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + elements * bytes;
}

// Batch entry b alone. Its outputs are `PrefillMemory`'s.
AttentionProblem entry_of(const AttentionProblem& p, std::int64_t b) {
  AttentionProblem entry = p;
  entry.batch = 1;
  kernels::KeySegment& keys = entry.key_segments[0];
  entry.queries[0].data = advance(p.queries[0].data, b * p.queries[0].strides.batch, kElementBytes);
  keys.key = advance(keys.key, b * keys.key_strides.batch, kElementBytes);
  keys.value = advance(keys.value, b * keys.value_strides.batch, kElementBytes);
  if (keys.lengths != nullptr) keys.lengths += b * keys.length_stride;
  keys.mask.data = advance(keys.mask.data, b * keys.mask.strides.batch, 1);
  return entry;
}

// Whether the kernel can write `out` itself, which is aligned, or the call would have been refused.
bool writes_out(const AttentionProblem& p, Engine engine) {
  const Strides& out = p.out_strides;
  if (p.batch > 1 && out.batch != p.rows * out.token) return false;
  return engine == Engine::hopper || (out.head == p.head_size && out.token == p.heads * p.head_size);
}

// The sequences of batch entry b alone.
kernels::cuda::Sequences sequences_of_entry(const kernels::cuda::Sequences& all, const PackedSequences& packed,
                                            const AttentionProblem& p, std::int64_t b) {
  const auto first_from = [&](std::int64_t row) {  // of the sequences
    std::int64_t s = 0;
    while (s < all.count && packed.numbers[static_cast<std::size_t>(4 * s)] < row) ++s;
    return s;
  };
  kernels::cuda::Sequences entry = all;
  const std::int64_t first = first_from(b * p.rows);
  entry.numbers += 4 * first;
  entry.count = first_from((b + 1) * p.rows) - first;
  entry.rows_before = b * p.rows;
  entry.keys_before = b * p.keys;
  return entry;
}

class FlashInferAttentionImpl final : public AttentionImpl {
 public:
  using AttentionImpl::AttentionImpl;

  void run(const AttentionCall& call) const override {
    const KernelCall kernel = to_kernel_call(call, *this, kAlignment);
    AttentionProblem problem = kernel.problem;
    const DLDevice device = call.query.device();
    const kernels::cuda::Launch launch{.device = device.device_id, .stream = current_stream(device)};
    const bool packed = kernel.plan.ranges != nullptr;
    const kernels::cuda::Sequences sequences = sequences_of(kernel.plan, device);
    if (problem.keys == 0 || (packed && sequences.count == 0)) return finish_rows(problem, launch);
    if (packed) problem.causal = config().causal;  // within each sequence
    Parts parts;
    std::optional<JoinedProblem> joined;
    if (kernel.plan.num_keys > 1) {
      problem = joined.emplace(kernel.problem, JoinedProblem::MaskType::boolean, parts).problem();
    }

    const BuiltPrefill& prefill = choose_prefill(problem, device.device_id);
    const bool fa2 = prefill.engine == Engine::fa2;
    const bool together = follow_each_other(problem) && (!fa2 || extent(problem) < kFa2Extent);
    const AttentionProblem first = together ? problem : entry_of(problem, 0);
    if (problem.batch * std::max(problem.rows * (problem.heads / problem.kv_heads), problem.keys) > kTokenLimit ||
        (fa2 && extent(first) >= kFa2Extent)) {
      throw NotImplementedError(fmt::format(
          "FLASHINFER_ATTN's kernels count in 32 bits, which a batch of {} with {} query rows and {} keys, or "
          "strides that span {} elements, exceeds. Make tensors contiguous, split the batch, or select "
          "TORCH_SDPA or another backend.",
          problem.batch, problem.rows, problem.keys, extent(first)));
    }
    const std::int64_t rows = problem.batch * problem.rows * problem.heads;
    const bool own_out = writes_out(problem, prefill.engine);
    const std::int64_t plan = parts.add(fa2 ? flashinfer_attn::plan_entries(first, sequences) * 4 : 0);
    const std::int64_t lse = parts.add(problem.lse == nullptr ? 0 : rows * 4);
    const std::int64_t out = parts.add(own_out ? 0 : rows * problem.head_size * kElementBytes);
    const Scratch scratch(parts.total(), device);
    char* memory = scratch.data();
    if (joined) problem = joined->write(memory, launch);

    const Strides contiguous{.batch = problem.rows * problem.heads * problem.head_size,
                             .token = problem.heads * problem.head_size,
                             .head = problem.head_size};
    PrefillMemory of_call{.out = own_out ? problem.out : memory + out,
                          .out_strides = own_out ? problem.out_strides : contiguous,
                          .lse = problem.lse == nullptr ? nullptr : reinterpret_cast<float*>(memory + lse),
                          .plan = reinterpret_cast<std::int32_t*>(memory + plan),
                          .sequences = sequences};
    if (together) {
      run_prefill(prefill, problem, of_call, launch);
    } else {
      for (std::int64_t b = 0; b < problem.batch; ++b) {
        PrefillMemory of_entry = of_call;
        if (packed) {
          of_entry.sequences = sequences_of_entry(sequences, kernel.plan.ranges->sequences.value(), problem, b);
          if (of_entry.sequences.count == 0) continue;
        }
        of_entry.out = static_cast<char*>(of_call.out) + b * of_call.out_strides.batch * kElementBytes;
        if (of_call.lse != nullptr) of_entry.lse += b * problem.rows * problem.heads;
        run_prefill(prefill, entry_of(problem, b), of_entry, launch);
      }
    }
    if (!own_out) write_out(problem, of_call.out, launch);
    if (problem.lse != nullptr) {
      const Strides of_lse{.batch = problem.rows * problem.heads, .token = problem.heads, .head = 1};
      write_lse(problem, {.data = of_call.lse, .strides = of_lse, .factor = kLn2}, launch);
    }
    if (has_rows_without_keys(kernel.plan, problem)) finish_rows(problem, launch);
  }
};

// The values that some built kernel has, in the order given.
template <class Value, class Of>
std::vector<Value> built_values(std::initializer_list<Value> values, Of of) {
  std::vector<Value> result;
  const auto built = flashinfer_attn::built_prefills();
  std::ranges::copy_if(values, std::back_inserter(result), [&](const Value& value) {
    return std::ranges::any_of(built, [&](const BuiltPrefill& one) { return of(one) == value; });
  });
  return result;
}

class FlashInferAttentionBackend final : public AttentionBackend {
 public:
  [[nodiscard]] std::string get_name() const override { return "FLASHINFER_ATTN"; }

  [[nodiscard]] const Capabilities& capabilities() const override {
    static const Capabilities can = [] {
      Capabilities built{.engine = "FlashInfer " DITATTN_FLASHINFER_VERSION,
                         .devices = {"cuda"},
                         .dtypes = {},
                         .head_sizes = {},
                         .masks = {"padding", "bool"},
                         .gqa = true,
                         .causal = true,
                         .causal_alignment = kAlignment,
                         .lse = true,
                         .packed = true,
                         .joint = true,
                         .graph_safe = true,
                         .masked_nan_propagates = true,
                         .alignment = 16};
      built.dtypes = built_values({kFloat16, kBFloat16}, [](const BuiltPrefill& one) {
        return one.type == kernels::ElementType::bfloat16 ? kBFloat16 : kFloat16;
      });
      built.head_sizes.list = built_values({std::int64_t{64}, std::int64_t{128}, std::int64_t{256}},
                                           [](const BuiltPrefill& one) { return one.head_size; });
      return built;
    }();
    return can;
  }

  void validate_available() const override { require_cuda(get_name(), kOldestComputeCapability); }

  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    Verdict verdict = check_capabilities(get_name(), capabilities(), problem);
    refuse_masked_packing(get_name(), problem, verdict);
    if (problem.causal && !problem.packed && problem.seq_kv < problem.seq_q) {
      verdict.reasons.push_back(
          fmt::format("FLASHINFER_ATTN does not support causal=True with fewer keys than query rows (seq_q={}, "
                      "seq_kv={}). Select FLASH_ATTN, TORCH_SDPA or another backend.",
                      problem.seq_q, problem.seq_kv));
    }
    return verdict;
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    require_positive_scale(get_name(), config);
    return std::make_unique<FlashInferAttentionImpl>(config);
  }
};

}  // namespace

BackendClass find_flashinfer_attn(std::string_view class_name) {
  static const BackendClass backend = std::make_shared<FlashInferAttentionBackend>();
  return class_name == "FlashInferAttentionBackend" ? backend : nullptr;
}

}  // namespace ditattn
