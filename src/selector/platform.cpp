// The platforms' ordered candidates.

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>
#include <mutex>

#include "core/fork_locks.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/selector.hpp"
#include "registry/enum.hpp"

namespace ditattn {
namespace {

using Enum = DiffusionAttentionBackendEnum;

// One line of a platform's list: a backend, and the library version it is good from.
struct Candidate {
  Enum member;
  std::int64_t min_cudnn = 0;
};

// Candidates of devices from a compute capability on; the highest that fits counts.
struct Generation {
  std::int64_t min_compute_capability;
  std::vector<Candidate> candidates;
};

using Generations = std::vector<Generation>;  // descending

constexpr std::int64_t kBlackwell = 100;

std::map<std::string, Generations>& platforms() {
  // cuDNN goes first on Blackwell only: from 9.5 on it has kernels for it, and FLASH_ATTN's are for Hopper.
  static std::map<std::string, Generations>& table = *new std::map<std::string, Generations>{
      {"cpu", {{0, {{Enum::FLASH_ATTN}, {Enum::TORCH_SDPA}}}}},
      {"cuda",
       {{kBlackwell, {{Enum::CUDNN_ATTN, 90500}, {Enum::FLASHINFER_ATTN}, {Enum::FLASH_ATTN}, {Enum::TORCH_SDPA}}},
        {80, {{Enum::FLASH_ATTN}, {Enum::CUDNN_ATTN}, {Enum::FLASHINFER_ATTN}, {Enum::TORCH_SDPA}}},
        {0, {{Enum::TORCH_SDPA}}}}},
  };
  return table;
}

// As cuDNN reports it, 0 where it cannot be opened. Asked only where a candidate depends on it.
std::int64_t cudnn_version() {
  static const std::int64_t version = [] {
    void* library = ::dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return std::int64_t{0};
    const auto get = reinterpret_cast<std::size_t (*)()>(::dlsym(library, "cudnnGetVersion"));
    return get == nullptr ? std::int64_t{0} : static_cast<std::int64_t>(get());
  }();
  return version;
}

std::mutex& platforms_mutex() {
  static std::mutex mutex;
  [[maybe_unused]] static const bool held = hold_over_fork(mutex);
  return mutex;
}

}  // namespace

std::vector<Enum> platform_candidates(const Platform& platform) {
  std::lock_guard lock(platforms_mutex());
  const auto found = platforms().find(platform.device);
  if (found == platforms().end()) {
    std::vector<std::string> names;
    for (const auto& [name, generations] : platforms()) names.push_back(name);
    throw ValueError(
        fmt::format("Unknown device '{}'. Valid devices are: {}", platform.device, fmt::join(names, ", ")));
  }
  std::vector<Enum> members;
  for (const Generation& generation : found->second) {
    if (platform.compute_capability < generation.min_compute_capability) continue;
    for (const Candidate& candidate : generation.candidates) {
      if (platform.cudnn_version >= candidate.min_cudnn) members.push_back(candidate.member);
    }
    break;
  }
  return members;
}

std::vector<Enum> platform_candidates(const std::string& device) {
  if (device != "cuda") return platform_candidates(Platform{.device = device});
  const CudaInfo& info = cuda_info();
  if (info.devices.empty()) {
    throw ImportError(fmt::format("Device 'cuda' is unavailable: {}. Use device 'cpu'.", info.reason));
  }
  const std::int64_t capability = info.devices.front().compute_capability;
  return platform_candidates(Platform{.device = device,
                                      .compute_capability = capability,
                                      .cudnn_version = capability >= kBlackwell ? cudnn_version() : 0});
}

void define_platform(const std::string& device, std::vector<Enum> candidates) {
  if (device.empty()) throw ValueError("A platform needs a device's name.");
  if (candidates.empty()) throw ValueError(fmt::format("Platform '{}' needs at least one candidate.", device));
  Generation all{.min_compute_capability = 0, .candidates = {}};
  for (const Enum member : candidates) all.candidates.push_back({member});
  {
    std::lock_guard lock(platforms_mutex());
    platforms().insert_or_assign(device, Generations{std::move(all)});
  }
  forget_resolved_members();
}

}  // namespace ditattn
