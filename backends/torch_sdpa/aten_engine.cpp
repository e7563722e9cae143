#include "backends/torch_sdpa/aten_engine.hpp"

#include <ditattn/errors.hpp>
#include <dlfcn.h>
#include <fmt/format.h>

#include <array>
#include <bit>
#include <cstdint>
#include <mutex>
#include <type_traits>
#include <utility>

namespace ditattn::aten {
namespace {

using kernels::AttentionProblem;
using kernels::ElementType;
using kernels::Strides;

// As the shim has them. A stack of values goes in, results come back in it: tensors and optional values as pointers
// that PyTorch takes over.
using Status = std::int32_t;
using TensorHandle = struct AtenTensor*;
using GuardHandle = struct StreamGuard*;
using StackValue = std::uint64_t;

constexpr std::uint64_t kOldest = (std::uint64_t{2} << 56) | (std::uint64_t{7} << 48);  // has the dispatcher's entry

struct LibTorch {
  std::uint64_t (*aoti_torch_abi_version)() = nullptr;
  std::int32_t (*aoti_torch_device_type_cpu)() = nullptr;
  std::int32_t (*aoti_torch_device_type_cuda)() = nullptr;
  std::int32_t (*aoti_torch_dtype_float32)() = nullptr;
  std::int32_t (*aoti_torch_dtype_float16)() = nullptr;
  std::int32_t (*aoti_torch_dtype_bfloat16)() = nullptr;
  std::int32_t (*aoti_torch_dtype_bool)() = nullptr;
  Status (*aoti_torch_create_tensor_from_blob)(void* data, std::int64_t ndim, const std::int64_t* sizes,
                                               const std::int64_t* strides, std::int64_t storage_offset,
                                               std::int32_t dtype, std::int32_t device_type, std::int32_t device_index,
                                               TensorHandle* tensor) = nullptr;
  Status (*aoti_torch_delete_tensor_object)(TensorHandle tensor) = nullptr;
  Status (*aoti_torch_copy_)(TensorHandle self, TensorHandle source, std::int32_t non_blocking) = nullptr;
  Status (*aoti_torch_call_dispatcher)(const char* name, const char* overload, StackValue* stack) = nullptr;
  // What older or CPU-only builds lack.
  Status (*torch_new_stable_ivalue)(StackValue** value) = nullptr;
  const char* (*torch_exception_get_what_without_backtrace)() = nullptr;
  Status (*aoti_torch_create_cuda_stream_guard)(void* stream, std::int32_t device, GuardHandle* guard) = nullptr;
  Status (*aoti_torch_delete_cuda_stream_guard)(GuardHandle guard) = nullptr;

  std::string version;
  std::string problem;
};

LibTorch open_libtorch() {
  LibTorch torch;
  void* library = ::dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    torch.problem = ::dlerror();
    return torch;
  }
  const auto find = [&](auto& function, void* in, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(in, name));
    return function != nullptr;
  };
  const auto need = [&](auto& function, const char* name) {
    if (find(function, library, name) || !torch.problem.empty()) return;
    torch.problem = fmt::format("libtorch_cpu.so has no {}: PyTorch 2.7 is the oldest that does", name);
  };
  need(torch.aoti_torch_abi_version, "aoti_torch_abi_version");
  need(torch.aoti_torch_device_type_cpu, "aoti_torch_device_type_cpu");
  need(torch.aoti_torch_device_type_cuda, "aoti_torch_device_type_cuda");
  need(torch.aoti_torch_dtype_float32, "aoti_torch_dtype_float32");
  need(torch.aoti_torch_dtype_float16, "aoti_torch_dtype_float16");
  need(torch.aoti_torch_dtype_bfloat16, "aoti_torch_dtype_bfloat16");
  need(torch.aoti_torch_dtype_bool, "aoti_torch_dtype_bool");
  need(torch.aoti_torch_create_tensor_from_blob, "aoti_torch_create_tensor_from_blob");
  need(torch.aoti_torch_delete_tensor_object, "aoti_torch_delete_tensor_object");
  need(torch.aoti_torch_copy_, "aoti_torch_copy_");
  need(torch.aoti_torch_call_dispatcher, "aoti_torch_call_dispatcher");
  if (!torch.problem.empty()) return torch;
  find(torch.torch_new_stable_ivalue, library, "torch_new_stable_ivalue");
  find(torch.torch_exception_get_what_without_backtrace, library, "torch_exception_get_what_without_backtrace");
  if (void* cuda = ::dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_LOCAL)) {
    find(torch.aoti_torch_create_cuda_stream_guard, cuda, "aoti_torch_create_cuda_stream_guard");
    find(torch.aoti_torch_delete_cuda_stream_guard, cuda, "aoti_torch_delete_cuda_stream_guard");
  }
  const std::uint64_t version = torch.aoti_torch_abi_version();
  const auto text = fmt::format("{}.{}.{}", version >> 56, version >> 48 & 255, version >> 40 & 255);
  if (version < kOldest) {
    torch.problem = fmt::format("PyTorch {} is older than 2.7", text);
  } else {
    torch.version = text;
  }
  return torch;
}

const LibTorch& libtorch() {
  static const LibTorch& opened = *new LibTorch(open_libtorch());
  return opened;
}

void check(Status status, const char* what) {
  if (status == 0) return;
  const auto get_reason = libtorch().torch_exception_get_what_without_backtrace;
  throw Error("RuntimeError", fmt::format("TORCH_SDPA: PyTorch {} cannot {}: {}", libtorch().version, what,
                                          get_reason == nullptr ? "its reason is on stderr" : get_reason()));
}

// A tensor of PyTorch that is ours until it is released.
class Handle {
 public:
  Handle() = default;
  ~Handle() {
    if (handle_ != nullptr) libtorch().aoti_torch_delete_tensor_object(handle_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  [[nodiscard]] TensorHandle* address() { return &handle_; }
  [[nodiscard]] TensorHandle get() const { return handle_; }
  [[nodiscard]] TensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  TensorHandle handle_ = nullptr;
};

// PyTorch's current stream, for a while.
class InStream {
 public:
  explicit InStream(const Place& place) {
    if (place.cuda_device < 0) return;
    check(libtorch().aoti_torch_create_cuda_stream_guard(place.stream, place.cuda_device, &guard_), "use the stream");
  }
  ~InStream() {
    if (guard_ != nullptr) libtorch().aoti_torch_delete_cuda_stream_guard(guard_);
  }
  InStream(const InStream&) = delete;
  InStream& operator=(const InStream&) = delete;

 private:
  GuardHandle guard_ = nullptr;
};

std::int32_t dtype_of(ElementType type) {
  switch (type) {
    case ElementType::float32:
      return libtorch().aoti_torch_dtype_float32();
    case ElementType::float16:
      return libtorch().aoti_torch_dtype_float16();
    case ElementType::bfloat16:
      return libtorch().aoti_torch_dtype_bfloat16();
    default:
      return libtorch().aoti_torch_dtype_bool();
  }
}

// Memory of ours as a tensor: (batch, heads, tokens, channels), PyTorch's order.
void view(Handle& handle, const void* data, ElementType type, const std::array<std::int64_t, 4>& sizes,
          const std::array<std::int64_t, 4>& strides, const Place& place) {
  const bool cpu = place.cuda_device < 0;
  check(libtorch().aoti_torch_create_tensor_from_blob(
            const_cast<void*>(data), 4, sizes.data(), strides.data(), 0, dtype_of(type),
            cpu ? libtorch().aoti_torch_device_type_cpu() : libtorch().aoti_torch_device_type_cuda(),
            cpu ? 0 : place.cuda_device, handle.address()),
        "wrap a tensor");
}

StackValue stack_value(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }
StackValue stack_value(double number) { return std::bit_cast<StackValue>(number); }
StackValue stack_value(bool truth) { return truth ? 1 : 0; }

// A value where the schema has an optional one.
template <class T>
StackValue optional_value(T value) {
  StackValue* place = nullptr;
  if (libtorch().torch_new_stable_ivalue != nullptr) {
    check(libtorch().torch_new_stable_ivalue(&place), "make a value");
  } else {
    place = new StackValue;
  }
  *place = stack_value(value);
  return stack_value(place);
}

// PyTorch's GPU kernels read 16 bytes at once, from memory that its own allocator would have given.
bool is_aligned(const void* data, const Strides& strides, ElementType type) {
  constexpr std::int64_t bytes = 16;
  const std::int64_t all = strides.batch | strides.token | strides.head;
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0 && all * kernels::element_bytes(type) % bytes == 0;
}

bool forward_strides(const Strides& strides) { return strides.batch >= 0 && strides.token >= 0 && strides.head >= 0; }

}  // namespace

const std::string& version() { return libtorch().version; }
const std::string& problem() { return libtorch().problem; }

bool takes(const AttentionProblem& p, const Place& place) {
  if (libtorch().version.empty()) return false;
  if (place.cuda_device >= 0 && libtorch().aoti_torch_create_cuda_stream_guard == nullptr) return false;
  if (!(p.scale > 0)) return false;  // its kernels take the largest product for the largest logit
  if (p.num_queries != 1 || p.num_key_segments != 1 || p.ranges != nullptr || p.lse != nullptr || p.keys == 0)
    return false;
  const kernels::KeySegment& keys = p.key_segments[0];
  if (keys.lengths != nullptr || !forward_strides(p.queries[0].strides) || !forward_strides(keys.key_strides) ||
      !forward_strides(keys.value_strides) || !forward_strides(p.out_strides)) {
    return false;
  }
  if (place.cuda_device >= 0 &&
      (!is_aligned(p.queries[0].data, p.queries[0].strides, p.type) ||
       !is_aligned(keys.key, keys.key_strides, p.type) || !is_aligned(keys.value, keys.value_strides, p.type) ||
       !is_aligned(keys.mask.data, {}, ElementType::boolean))) {
    return false;
  }
  if (keys.mask.data == nullptr) return true;
  return !p.causal && (keys.mask.type == ElementType::boolean || keys.mask.type == p.type) &&
         forward_strides(keys.mask.strides) && keys.mask.key_stride >= 0;
}

void attention(const AttentionProblem& p, const Place& place) {
  const InStream in_stream(place);
  const kernels::KeySegment& keys = p.key_segments[0];
  const auto wrap = [&](Handle& handle, const void* data, std::int64_t heads, std::int64_t tokens, const Strides& of) {
    view(handle, data, p.type, {p.batch, heads, tokens, p.head_size}, {of.batch, of.head, of.token, 1}, place);
  };
  Handle query;
  Handle key;
  Handle value;
  Handle mask;
  Handle out;
  wrap(query, p.queries[0].data, p.heads, p.rows, p.queries[0].strides);
  wrap(key, keys.key, p.kv_heads, p.keys, keys.key_strides);
  wrap(value, keys.value, p.kv_heads, p.keys, keys.value_strides);
  wrap(out, p.out, p.heads, p.rows, p.out_strides);
  const bool masked = keys.mask.data != nullptr;
  if (masked) {
    const Strides& of = keys.mask.strides;
    const auto extent = [](std::int64_t stride, std::int64_t size) { return stride == 0 ? 1 : size; };
    view(mask, keys.mask.data, keys.mask.type,
         {extent(of.batch, p.batch), extent(of.head, p.heads), extent(of.token, p.rows), p.keys},
         {of.batch, of.head, of.token, keys.mask.key_stride}, place);
  }
  std::array<StackValue, 8> stack = {stack_value(query.release()),
                                     stack_value(key.release()),
                                     stack_value(value.release()),
                                     masked ? optional_value(mask.release()) : 0,
                                     stack_value(0.0),  // dropout
                                     stack_value(p.causal),
                                     optional_value(static_cast<double>(p.scale)),
                                     stack_value(p.heads != p.kv_heads)};
  const auto compute = [&] {
    check(libtorch().aoti_torch_call_dispatcher("aten::scaled_dot_product_attention", "", stack.data()),
          "compute attention");
  };
  // Of several first calls on a GPU at once, one sometimes gets another kernel of PyTorch's (2.11) than all calls after
  // it, and other bits: in 5 of 107 busy processes of 8 threads. Why is not known; so the first one ends before others
  // begin.
  static std::once_flag first;
  bool is_first = false;
  if (place.cuda_device >= 0) {
    std::call_once(first, [&] {
      compute();
      is_first = true;
    });
  }
  if (!is_first) compute();
  Handle result;
  *result.address() = std::bit_cast<TensorHandle>(stack[0]);
  check(libtorch().aoti_torch_copy_(out.get(), result.get(), /*non_blocking=*/1), "copy the result");
}

}  // namespace ditattn::aten
