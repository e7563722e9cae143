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
  if (config.softmax_scale.value_or(1) > 0) return;
  throw ValueError(
      fmt::format("{} needs a softmax_scale above 0, got {}: its engine takes the largest product for the largest "
                  "logit. Select TORCH_SDPA or another backend.",
                  backend, *config.softmax_scale));
}

}  // namespace ditattn
