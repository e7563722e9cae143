#include "core/cuda_driver.hpp"

#include <dlfcn.h>
#include <fmt/format.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <mutex>

#include "ditattn/errors.hpp"

namespace ditattn {
namespace {

// As cuda.h has them.
using Result = int;
using Device = int;
using Context = void*;
using Stream = void*;
using Address = void*;  // CUdeviceptr, a number of the same size
constexpr Result kOutOfMemory = 2;
constexpr int kMultiprocessors = 16;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

enum class MemoryType : unsigned { host = 1, device = 2 };

// CUDA_MEMCPY2D.
struct RectangleCopy {
  struct Side {
    std::size_t x_bytes = 0;
    std::size_t y = 0;
    MemoryType type = MemoryType::host;
    const void* host = nullptr;
    const void* device = nullptr;
    const void* array = nullptr;
    std::size_t pitch = 0;
  };
  Side from;
  Side to;
  std::size_t width_bytes = 0;
  std::size_t height = 0;
};

void* const kLegacyStream = reinterpret_cast<void*>(1);  // CU_STREAM_LEGACY

struct Driver {
  Result (*cuInit)(unsigned flags) = nullptr;
  Result (*cuDriverGetVersion)(int* version) = nullptr;
  Result (*cuGetErrorString)(Result error, const char** text) = nullptr;
  Result (*cuDeviceGetCount)(int* count) = nullptr;
  Result (*cuDeviceGet)(Device* device, int ordinal) = nullptr;
  Result (*cuDeviceGetName)(char* name, int length, Device device) = nullptr;
  Result (*cuDeviceGetAttribute)(int* value, int attribute, Device device) = nullptr;
  Result (*cuDeviceTotalMem_v2)(std::size_t* bytes, Device device) = nullptr;
  Result (*cuDevicePrimaryCtxRetain)(Context* context, Device device) = nullptr;
  Result (*cuCtxPushCurrent_v2)(Context context) = nullptr;
  Result (*cuCtxPopCurrent_v2)(Context* context) = nullptr;
  Result (*cuMemGetInfo_v2)(std::size_t* free, std::size_t* total) = nullptr;
  Result (*cuMemAllocAsync)(Address* address, std::size_t bytes, Stream stream) = nullptr;
  Result (*cuMemFreeAsync)(Address address, Stream stream) = nullptr;
  Result (*cuMemcpyAsync)(Address to, const void* from, std::size_t bytes, Stream stream) = nullptr;
  Result (*cuMemcpy2DAsync_v2)(const RectangleCopy* copy, Stream stream) = nullptr;
  Result (*cuStreamSynchronize)(Stream stream) = nullptr;
  Result (*cuStreamIsCapturing)(Stream stream, int* status) = nullptr;
  std::string problem;  // why it cannot be used; empty if it can
};

Driver open_driver() {
  Driver driver;
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    driver.problem = fmt::format("the NVIDIA driver cannot be opened ({})", ::dlerror());
    return driver;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
    if (function == nullptr && driver.problem.empty()) {
      driver.problem = fmt::format("the NVIDIA driver is too old: libcuda.so.1 has no {}", name);
    }
  };
  find(driver.cuInit, "cuInit");
  find(driver.cuDriverGetVersion, "cuDriverGetVersion");
  find(driver.cuGetErrorString, "cuGetErrorString");
  find(driver.cuDeviceGetCount, "cuDeviceGetCount");
  find(driver.cuDeviceGet, "cuDeviceGet");
  find(driver.cuDeviceGetName, "cuDeviceGetName");
  find(driver.cuDeviceGetAttribute, "cuDeviceGetAttribute");
  find(driver.cuDeviceTotalMem_v2, "cuDeviceTotalMem_v2");
  find(driver.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  find(driver.cuCtxPushCurrent_v2, "cuCtxPushCurrent_v2");
  find(driver.cuCtxPopCurrent_v2, "cuCtxPopCurrent_v2");
  find(driver.cuMemGetInfo_v2, "cuMemGetInfo_v2");
  find(driver.cuMemAllocAsync, "cuMemAllocAsync");
  find(driver.cuMemFreeAsync, "cuMemFreeAsync");
  find(driver.cuMemcpyAsync, "cuMemcpyAsync");
  find(driver.cuMemcpy2DAsync_v2, "cuMemcpy2DAsync_v2");
  find(driver.cuStreamSynchronize, "cuStreamSynchronize");
  find(driver.cuStreamIsCapturing, "cuStreamIsCapturing");
  return driver;
}

const Driver& driver() {
  static const Driver opened = open_driver();
  return opened;
}

std::string error_text(Result result) {
  const char* text = nullptr;
  if (driver().cuGetErrorString(result, &text) != 0 || text == nullptr) return fmt::format("error {}", result);
  return fmt::format("{} (error {})", text, result);
}

void check(Result result, const char* what, int device) {
  if (result != 0)
    throw Error("RuntimeError", fmt::format("{} failed on cuda:{}: {}", what, device, error_text(result)));
}

CudaInfo find_devices() {
  CudaInfo info;
  const Driver& cuda = driver();
  info.reason = cuda.problem;
  if (!info.reason.empty()) return info;
  int version = 0;
  if (cuda.cuDriverGetVersion(&version) == 0) info.driver_version = version;
  int count = 0;
  Result result = cuda.cuInit(0);
  if (result == 0) result = cuda.cuDeviceGetCount(&count);
  if (result != 0 || count == 0) {
    info.reason = result != 0 ? fmt::format("the NVIDIA driver does not start: {}", error_text(result))
                              : "the NVIDIA driver shows no device";
    return info;
  }
  for (int i = 0; i < count; ++i) {
    Device device = 0;
    char name[256] = {};
    int major = 0;
    int minor = 0;
    int multiprocessors = 0;
    std::size_t bytes = 0;
    check(cuda.cuDeviceGet(&device, i), "cuDeviceGet", i);
    check(cuda.cuDeviceGetName(name, sizeof(name), device), "cuDeviceGetName", i);
    check(cuda.cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device), "cuDeviceGetAttribute", i);
    check(cuda.cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device), "cuDeviceGetAttribute", i);
    check(cuda.cuDeviceGetAttribute(&multiprocessors, kMultiprocessors, device), "cuDeviceGetAttribute", i);
    check(cuda.cuDeviceTotalMem_v2(&bytes, device), "cuDeviceTotalMem", i);
    info.devices.push_back({.name = name,
                            .compute_capability = 10 * major + minor,
                            .memory_bytes = static_cast<std::int64_t>(bytes),
                            .multiprocessors = multiprocessors});
  }
  return info;
}

// The device's primary context, which CUDA's runtime and PyTorch use too; kept for the process.
Context primary_context(int device) {
  const auto count = static_cast<int>(cuda_info().devices.size());
  if (device < 0 || device >= count) {
    throw ValueError(count == 0 ? fmt::format("There is no device cuda:{}: {}.", device, cuda_info().reason)
                                : fmt::format("There is no device cuda:{}: there are {}.", device, count));
  }
  static std::mutex mutex;
  static std::vector<Context> contexts(static_cast<std::size_t>(count));
  const std::lock_guard lock(mutex);
  Context& context = contexts[static_cast<std::size_t>(device)];
  if (context == nullptr)
    check(driver().cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain", device);
  return context;
}

// Makes a device's context current, and the one before it again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    Context context = primary_context(device);  // first: without a driver there is no function to look at
    check(driver().cuCtxPushCurrent_v2(context), "cuCtxPushCurrent", device);
  }
  ~OnDevice() {
    Context context = nullptr;
    driver().cuCtxPopCurrent_v2(&context);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
};

}  // namespace

const CudaInfo& cuda_info() {
  static const CudaInfo info = find_devices();
  return info;
}

void* current_stream(DLDevice device) {
  return device.device_type == kDLCPU ? nullptr : TVMFFIEnvGetStream(device.device_type, device.device_id);
}

namespace cuda {

void* allocate(std::size_t bytes, int device, void* stream) {
  const OnDevice on_device(device);
  Address address = nullptr;
  const Result result = driver().cuMemAllocAsync(&address, bytes, stream);
  if (result == kOutOfMemory) {
    std::size_t free = 0;
    std::size_t total = 0;
    driver().cuMemGetInfo_v2(&free, &total);
    throw MemoryError(
        fmt::format("Cannot allocate {} bytes on cuda:{}: {} of {} are free.", bytes, device, free, total));
  }
  check(result, "cuMemAllocAsync", device);
  return address;
}

void release(void* memory, int device, void* stream) noexcept {
  try {
    const OnDevice on_device(device);
    driver().cuMemFreeAsync(memory, stream);
  } catch (const Error&) {  // the context is gone, and the memory with it
  }
}

void copy(void* to, const void* from, std::size_t bytes, int device, void* stream) {
  const OnDevice on_device(device);
  check(driver().cuMemcpyAsync(to, from, bytes, stream), "cuMemcpyAsync", device);
}

void copy_rows_to_host(void* to, const void* from, std::size_t step, std::size_t width, std::size_t rows, int device,
                       void* stream) {
  const OnDevice on_device(device);
  const RectangleCopy rectangle{.from = {.type = MemoryType::device, .device = from, .pitch = step},
                                .to = {.type = MemoryType::host, .host = to, .pitch = width},
                                .width_bytes = width,
                                .height = rows};
  check(driver().cuMemcpy2DAsync_v2(&rectangle, stream), "cuMemcpy2DAsync", device);
}

void wait_for(int device, void* stream) {
  const OnDevice on_device(device);
  check(driver().cuStreamSynchronize(stream), "cuStreamSynchronize", device);
}

bool is_capturing(int device, void* stream) {
  if (stream == nullptr || stream == kLegacyStream) return false;  // CUDA captures no default stream
  int status = 0;                                                  // no context is needed: a stream has its own
  check(driver().cuStreamIsCapturing(stream, &status), "cuStreamIsCapturing", device);
  return status != 0;
}

bool is_captured(DLDevice device) {
  return device.device_type == kDLCUDA && is_capturing(device.device_id, current_stream(device));
}

}  // namespace cuda
}  // namespace ditattn
