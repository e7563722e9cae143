#pragma once

/// What our own quantized kernels for GPUs have in common.

#include <ditattn/backend.hpp>
#include <ditattn/cuda.hpp>
#include <fmt/format.h>

#include <optional>
#include <string>

#include "backends/common/gpu_level.hpp"
#include "kernels/cuda/flash_device.hpp"

namespace ditattn {

/// The compute capability of whose kernels may be used on a device; none where there is no such device.
inline std::optional<int> usable_capability(DLDevice device) {
  const auto& devices = cuda_info().devices;
  const auto index = static_cast<std::size_t>(device.device_id);
  if (device.device_type != kDLCUDA || index >= devices.size()) return std::nullopt;
  return kernels::cuda::usable_capability(static_cast<int>(devices[index].compute_capability), gpu_level());
}

/// Why a problem that the capabilities allow, but which speak of the CPU, does not run on its GPU; `kernel_name` is of
/// the kernel that takes it.
inline void explain_quantized(const std::string& backend, const Problem& problem, const std::string& kernel_name,
                              Verdict& verdict) {
  const std::optional<int> capability = usable_capability(problem.device);
  if (!capability) return;
  if (*capability < kernels::cuda::kAmpereCapability) {
    verdict.reasons.push_back(
        fmt::format("{} was explicitly selected but does not provide a kernel for sm_{}. Select a compatible backend.",
                    backend, *capability));
  } else if (problem.dtype == kFloat32) {
    verdict.reasons.push_back(
        fmt::format("{} does not support dtype=float32 on cuda. Supported dtypes there: float16, bfloat16. Select "
                    "TORCH_SDPA or another backend.",
                    backend));
  } else if (kernel_name.empty()) {
    verdict.reasons.push_back(fmt::format(
        "{} was built without a kernel for head_size={} and dtype={} on cuda. Build with CUDA_SET=full, or select "
        "another backend.",
        backend, problem.head_size, dtype_name(problem.dtype)));
  }
}

}  // namespace ditattn
