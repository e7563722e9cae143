#include "parallel/device_tokens.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include <filesystem>

#include "ditattn/errors.hpp"
#include "registry/search_path.hpp"

namespace ditattn::parallel {
namespace {

struct Opened {
  const DeviceTokens* functions = nullptr;
  std::string reason;
};

Opened open_library() {
  const std::string file = (std::filesystem::path(library_directory()) / "libditattn_nccl.so").string();
  void* library = ::dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return {.reason = ::dlerror()};
  const auto get = reinterpret_cast<decltype(&ditattn_device_tokens)>(::dlsym(library, "ditattn_device_tokens"));
  if (get == nullptr) return {.reason = file + " has no ditattn_device_tokens"};
  return {.functions = get(), .reason = {}};
}

}  // namespace

const DeviceTokens& device_tokens(DLDevice device) {
  static const Opened opened = open_library();
  if (device.device_type == kDLCUDA && opened.functions != nullptr) return *opened.functions;
  throw NotImplementedError(fmt::format(
      "Several ranks compute in host memory and on NVIDIA GPUs, there with libditattn_nccl.so, which is built "
      "with DITATTN_CUDA=ON where there is nccl.h. Got tensors on {}; {}.",
      device_name(device), device.device_type == kDLCUDA ? opened.reason : "no such device"));
}

}  // namespace ditattn::parallel
