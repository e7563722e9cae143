// Tensors in device memory: allocation, copies, and host arrays that kernels read.

#include <fmt/format.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <map>
#include <mutex>
#include <utility>

#include "core/cuda_driver.hpp"
#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/metadata.hpp"

namespace ditattn {
namespace {

struct CudaAllocator {
  void* stream;
  void AllocData(DLTensor* tensor) const {
    const std::size_t bytes = std::max<std::size_t>(tvm::ffi::GetDataSize(*tensor), 1);
    tensor->data = cuda::allocate(bytes, tensor->device.device_id, stream);
  }
  void FreeData(DLTensor* tensor) const { cuda::release(tensor->data, tensor->device.device_id, stream); }
};

// A view of memory that it keeps.
struct KeptMemory {
  Tensor memory;
  void* data;
  void AllocData(DLTensor* tensor) const { tensor->data = data; }
  void FreeData(DLTensor* /*tensor*/) const {}
};

void check_device(DLDevice device) {
  if (device.device_type == kDLCPU || device.device_type == kDLCUDA) return;
  throw ValueError(
      fmt::format("There is no memory to be had on {}. Valid devices are: cpu, cuda", device_name(device)));
}

void refuse_in_capture(DLDevice device, const char* what) {
  if (!cuda::is_capturing(device.device_id, current_stream(device))) return;
  throw NotImplementedError(fmt::format(
      "{} cannot be done while {}'s stream is captured into a graph. Make the same call once before, with the same "
      "AttentionMetadata, and give `out`.",
      what, device_name(device)));
}

// A stream's scratch memory, and who may use it.
struct Kept {
  std::mutex turn;
  Tensor memory;
};

Kept& kept_for(int device, void* stream) {
  using Key = std::pair<int, void*>;
  static thread_local std::pair<Key, Kept*> last;  // a thread's calls are in one stream, mostly
  if (const Key key{device, stream}; last.second == nullptr || last.first != key) {
    static std::mutex mutex;
    static auto& kept = *new std::map<Key, Kept>;  // never destroyed: the driver may be gone before it
    const std::lock_guard lock(mutex);
    last = {key, &kept[key]};
  }
  return *last.second;
}

}  // namespace

Tensor empty(std::span<const std::int64_t> shape, DLDataType dtype, DLDevice device) {
  if (device.device_type == kDLCPU) return empty(shape, dtype);
  check_device(device);
  refuse_in_capture(device, "Allocating memory");
  const tvm::ffi::ShapeView view(shape.data(), shape.size());
  if (TVMFFIEnvGetDLPackManagedTensorAllocator() != nullptr) {  // PyTorch's, say, whose cache is warm
    return Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, view, dtype, device);
  }
  return Tensor::FromNDAlloc(CudaAllocator{current_stream(device)}, view, dtype, device);
}

Scratch::Scratch(std::int64_t bytes, DLDevice device) {
  if (bytes == 0) return;
  void* stream = current_stream(device);
  const auto allocate = [&] {
    return Tensor::FromNDAlloc(CudaAllocator{stream}, tvm::ffi::ShapeView(&bytes, 1), DLDataType{kDLUInt, 8, 1},
                               device);
  };
  if (cuda::is_capturing(device.device_id, stream)) {
    memory_ = allocate();
  } else {
    Kept& kept = kept_for(device.device_id, stream);
    turn_ = std::unique_lock(kept.turn);
    if (!kept.memory.defined() || kept.memory.numel() < bytes) kept.memory = allocate();
    memory_ = kept.memory;
  }
  data_ = static_cast<char*>(memory_.data_ptr());
}

void synchronize(DLDevice device) {
  if (device.device_type == kDLCUDA) cuda::wait_for(device.device_id, current_stream(device));
}

Tensor copy_to(const Tensor& tensor, DLDevice device) {
  const DLDevice source = tensor.device();
  check_device(source);
  check_device(device);
  const std::int64_t item = tensor.dtype().bits / 8;
  std::int64_t before = 0;  // bytes from the lowest element to the first
  std::int64_t after = item;
  for (int i = 0; i < tensor.ndim(); ++i) {
    const std::int64_t reach = tensor.stride(i) * (tensor.size(i) - 1) * item;
    (reach < 0 ? before : after) += reach < 0 ? -reach : reach;
  }
  const bool has_elements = tensor.numel() > 0;
  const Tensor memory = empty(std::array{has_elements ? before + after : 0}, DLDataType{kDLUInt, 8, 1}, device);
  if (has_elements) {
    const DLDevice gpu = source.device_type == kDLCUDA ? source : device;
    const char* from = static_cast<const char*>(data_pointer(tensor)) - before;
    if (gpu.device_type == kDLCPU) {
      std::copy_n(from, before + after, static_cast<char*>(memory.data_ptr()));
    } else {
      if (source.device_type != device.device_type) refuse_in_capture(gpu, "Copying between host and device");
      void* stream = current_stream(gpu);
      cuda::copy(memory.data_ptr(), from, static_cast<std::size_t>(before + after), gpu.device_id, stream);
      if (source.device_type != device.device_type) cuda::wait_for(gpu.device_id, stream);
    }
  }
  return Tensor::FromNDAllocStrided(KeptMemory{memory, static_cast<char*>(memory.data_ptr()) + before}, tensor.shape(),
                                    tensor.strides(), tensor.dtype(), device);
}

AttentionMetadata copy_to(const AttentionMetadata& metadata, DLDevice device) {
  if (!metadata.defined()) return metadata;
  AttentionMetadataFields fields = metadata->fields;
  for (auto* tensor :
       {&fields.attn_mask, &fields.joint_query, &fields.joint_key, &fields.joint_value, &fields.joint_attn_mask}) {
    if (tensor->has_value()) *tensor = copy_to(tensor->value(), device);
  }
  return AttentionMetadata(std::move(fields));
}

const std::int64_t* DeviceCopies::get(const std::vector<std::int64_t>& values, DLDevice device) const {
  if (device.device_type == kDLCPU) return values.data();
  const std::lock_guard lock(state_->mutex);
  for (const Tensor& copy : state_->copies) {
    if (copy.device().device_type == device.device_type && copy.device().device_id == device.device_id) {
      return static_cast<const std::int64_t*>(copy.data_ptr());
    }
  }
  const auto count = static_cast<std::int64_t>(values.size());
  state_->copies.push_back(copy_to(wrap(const_cast<std::int64_t*>(values.data()), {count}, kInt64), device));
  return static_cast<const std::int64_t*>(state_->copies.back().data_ptr());
}

}  // namespace ditattn
