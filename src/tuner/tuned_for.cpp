#include "tuner/tuned_for.hpp"

#include <fmt/format.h>

#include <cctype>
#include <cstdint>

#include "core/cpu_name.hpp"
#include "core/environment.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/threads.hpp"
#include "ditattn/version.hpp"

namespace ditattn {
namespace {

// FNV-1a: the same on every machine, which std::hash need not be.
std::uint64_t hash_of(const TunedFor& environment) {
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&](const std::string& text) {
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
    hash = (hash ^ 0xFF) * 0x100000001b3;  // in no UTF-8 text: ends it
  };
  for (const auto& [key, value] : environment) {
    mix(key);
    mix(value);
  }
  return hash;
}

}  // namespace

TunedFor tuned_for(DLDevice device) {
  TunedFor environment{{"device", std::string(device_type_name(device))}, {"ditattn", DITATTN_VERSION}};
  if (device.device_type == kDLCUDA) {
    const CudaInfo& info = cuda_info();
    if (device.device_id < 0 || static_cast<std::size_t>(device.device_id) >= info.devices.size()) {
      throw ImportError(
          fmt::format("Device '{}' is unavailable: {}", device_name(device),
                      info.reason.empty() ? fmt::format("there are {}", info.devices.size()) : info.reason));
    }
    const CudaDevice& gpu = info.devices[static_cast<std::size_t>(device.device_id)];
    environment["name"] = gpu.name;
    environment["compute_capability"] = std::to_string(gpu.compute_capability);
    environment["multiprocessors"] = std::to_string(gpu.multiprocessors);
    environment["driver"] = std::to_string(info.driver_version);
    environment["level"] = ditattn::environment(Env::DITATTN_GPU_LEVEL).value_or("");
    return environment;
  }
  environment["name"] = cpu_name();
  environment["threads"] = std::to_string(num_threads());
  environment["level"] = ditattn::environment(Env::DITATTN_CPU_LEVEL).value_or("");
  return environment;
}

std::string file_name(const TunedFor& environment) {
  std::string name;
  for (const char c : environment.at("name")) {
    const bool is_plain = std::isalnum(static_cast<unsigned char>(c)) != 0;
    if (is_plain)
      name += c;
    else if (!name.empty() && name.back() != '-')
      name += '-';
  }
  return fmt::format("tuned-{}-{:016x}.json", name.substr(0, 48), hash_of(environment));
}

}  // namespace ditattn
