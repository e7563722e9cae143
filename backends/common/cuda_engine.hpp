#pragma once

/// What the backends of others' CUDA engines have in common.

#include <ditattn/backend.hpp>
#include <ditattn/cuda.hpp>
#include <ditattn/errors.hpp>
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "kernels/attention_problem.hpp"
#include "kernels/cuda/sequences.hpp"

namespace ditattn {

/// The scratch memory of a call, in parts that start at multiples of 256 bytes.
class Parts {
 public:
  /// Where a part of `bytes` starts.
  std::int64_t add(std::int64_t bytes) {
    const std::int64_t start = total_;
    total_ += (bytes + 255) / 256 * 256;
    return start;
  }
  [[nodiscard]] std::int64_t total() const { return total_; }

 private:
  std::int64_t total_ = 0;
};

/// ImportError where no device has the compute capability, 80 for 8.0.
inline void require_cuda(const std::string& backend, std::int64_t compute_capability) {
  if (cuda_info().devices.empty()) {
    throw ImportError(fmt::format("{} needs a CUDA device: {}.", backend, cuda_info().reason));
  }
  const auto newest = std::ranges::max_element(cuda_info().devices, {}, &CudaDevice::compute_capability);
  if (newest->compute_capability < compute_capability) {
    throw ImportError(fmt::format("{} needs compute capability {}.{}, {} has {}.{}.", backend, compute_capability / 10,
                                  compute_capability % 10, newest->name, newest->compute_capability / 10,
                                  newest->compute_capability % 10));
  }
}

/// ValueError for scales that engines which look for the largest product, not the largest logit, get wrong.
inline void require_positive_scale(const std::string& backend, const ImplConfig& config) {
  const double scale = config.softmax_scale.value_or(1);
  if (scale > 0) return;
  throw ValueError(
      fmt::format("{} needs a softmax_scale above 0, got {}: its engine takes the largest product for the largest "
                  "logit. Select TORCH_SDPA or another backend.",
                  backend, scale));
}

/// The packed sequences of a call, in the device's memory; none where it has none that see keys.
inline kernels::cuda::Sequences sequences_of(const CallPlan& plan, DLDevice device) {
  if (plan.ranges == nullptr || !plan.ranges->sequences || plan.ranges->sequences->numbers.empty()) return {};
  const PackedSequences& packed = *plan.ranges->sequences;
  return {.numbers = packed.copies.get(packed.numbers, device),
          .count = packed.count(),
          .longest_rows = packed.longest_rows,
          .longest_keys = packed.longest_keys};
}

/// Whether some of the call's rows are in no packed sequence.
inline bool has_rows_without_keys(const CallPlan& plan, const kernels::AttentionProblem& problem) {
  return plan.ranges != nullptr && plan.ranges->sequences &&
         plan.ranges->sequences->total_rows < problem.batch * problem.rows;
}

/// A reason against masks beside packed sequences.
inline void refuse_masked_packing(const std::string& backend, const Problem& problem, Verdict& verdict) {
  if (!problem.packed || problem.mask == MaskKind::none) return;
  verdict.reasons.push_back(
      fmt::format("{} does not support packed sequences (cu_seqlens) together with a mask of kind {}. Leave the mask "
                  "out: cu_seqlens_k says which keys there are.",
                  backend, mask_kind_name(problem.mask)));
}

}  // namespace ditattn
