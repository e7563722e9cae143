// `torch.ops.ditattn` in C++: kernels for PyTorch's dispatcher, which calls them without Python. They go through
// PyTorch's stable C interface (torch/csrc/stable/c/shim.h, from 2.10 on), whose functions are looked up in the
// process: one binary serves every PyTorch, and none. Where they are missing torch_ops.py registers kernels in Python.

#include <dlfcn.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "ditattn/attention.hpp"
#include "ditattn/errors.hpp"
#include "objects.hpp"

// pybind11, which PyTorch's binding is made with, lets errors of this class set Python's exception themselves. Only the
// declaration is needed: what catches it is in PyTorch.
namespace pybind11 {
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};
}  // namespace pybind11

namespace ditattn::python {
namespace {

// An argument or a result: a number's bits, a handle, or, where the schema says optional, null or a pointer to such.
using StableIValue = std::uint64_t;
using TensorHandle = void*;
using LibraryHandle = void*;
using Kernel = void (*)(StableIValue* stack, std::uint64_t num_arguments, std::uint64_t num_results);
constexpr std::uint64_t kInterface = 0x020A000000000000;  // of PyTorch 2.10.0

// PyTorch's functions. All return 0 for success where they return an int.
struct Torch {
  int (*begin_registration)(const char* name, const char* key, const char* file, std::uint32_t line, LibraryHandle*);
  int (*register_kernel)(LibraryHandle, const char* name, Kernel, std::uint64_t interface);
  int (*call_dispatcher)(const char* name, const char* overload, StableIValue* stack, std::uint64_t interface);
  bool (*grad_mode_is_enabled)();
  int (*delete_tensor_object)(TensorHandle);
  int (*new_tensor_handle)(TensorHandle, TensorHandle*);
  int (*get_data_ptr)(TensorHandle, void**);
  int (*get_dim)(TensorHandle, std::int64_t*);
  int (*get_sizes)(TensorHandle, std::int64_t**);
  int (*get_strides)(TensorHandle, std::int64_t**);
  int (*get_dtype)(TensorHandle, std::int32_t*);
  int (*get_device_type)(TensorHandle, std::int32_t*);
  int (*get_device_index)(TensorHandle, std::int32_t*);
  int (*empty_strided)(std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t dtype, std::int32_t type,
                       std::int32_t index, TensorHandle*);
  int (*string_c_str)(void*, const char**);
  int (*delete_string)(void*);
  int (*get_current_cuda_stream)(std::int32_t, void**);  // null without CUDA
  bool (*requires_grad)(const void* tensor);             // C++'s own; null where it cannot be trusted
  void* (*python_thread)();                              // Python's; null where ending a handle does not need the GIL
  int (*take_gil)();
  void (*give_gil)(int);

  struct Type {
    std::int32_t torch;
    DLDataType dtype;
  };
  std::array<Type, 7> types;
  std::int32_t cpu_device;
  std::int32_t cuda_device;
};

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(::dlsym(library, name));
  return function != nullptr;
}

// A handle is an at::Tensor, which is a pointer to a c10::TensorImpl.
const void* implementation_of(TensorHandle handle) { return *static_cast<const void* const*>(handle); }

// Whether a tensor requires a gradient, which the stable interface does not tell, and an operator in Python in 2 µs. So
// it is c10::TensorImpl's member function that is asked, once it has answered right for a tensor with and without.
void find_requires_grad(void* cpu, Torch& torch) {
  void* c10 = ::dlopen("libc10.so", RTLD_NOW | RTLD_NOLOAD);
  int (*set)(TensorHandle, bool) = nullptr;
  bool (*function)(const void*) = nullptr;
  if (c10 == nullptr || !find(cpu, "torch_set_requires_grad", set) ||
      !find(c10, "_ZNK3c1010TensorImpl13requires_gradEv", function)) {
    return;
  }
  const std::int64_t one = 1;
  TensorHandle tensor = nullptr;
  if (torch.empty_strided(1, &one, &one, torch.types[0].torch, torch.cpu_device, 0, &tensor) != 0) return;
  const auto answers = [&](bool expected) {
    return set(tensor, expected) == 0 && function(implementation_of(tensor)) == expected;
  };
  if (answers(true) && answers(false)) torch.requires_grad = function;
  torch.delete_tensor_object(tensor);
}

// In newer PyTorchs (2.11 was looked at) the last but Python's own reference to a tensor is given back under the GIL.
void find_gil(Torch& torch) {
  void* c10 = ::dlopen("libc10.so", RTLD_NOW | RTLD_NOLOAD);
  void (*counts)(const void*) = nullptr;
  if (c10 == nullptr || !find(c10, "_ZNK3c1010TensorImpl15decref_pyobjectEv", counts) ||
      !find(RTLD_DEFAULT, "PyGILState_Ensure", torch.take_gil) ||
      !find(RTLD_DEFAULT, "PyGILState_Release", torch.give_gil)) {
    return;
  }
  find(RTLD_DEFAULT, "PyGILState_GetThisThreadState", torch.python_thread);
}

std::optional<Torch> find_torch() {
  void* cpu = ::dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  if (cpu == nullptr) return std::nullopt;
  Torch torch{};
  bool found =
      find(cpu, "aoti_torch_library_init_impl", torch.begin_registration) &&
      find(cpu, "torch_library_impl", torch.register_kernel) &&
      find(cpu, "torch_call_dispatcher", torch.call_dispatcher) &&
      find(cpu, "aoti_torch_grad_mode_is_enabled", torch.grad_mode_is_enabled) &&
      find(cpu, "aoti_torch_delete_tensor_object", torch.delete_tensor_object) &&
      find(cpu, "aoti_torch_new_tensor_handle", torch.new_tensor_handle) &&
      find(cpu, "aoti_torch_get_data_ptr", torch.get_data_ptr) && find(cpu, "aoti_torch_get_dim", torch.get_dim) &&
      find(cpu, "aoti_torch_get_sizes", torch.get_sizes) && find(cpu, "aoti_torch_get_strides", torch.get_strides) &&
      find(cpu, "aoti_torch_get_dtype", torch.get_dtype) &&
      find(cpu, "aoti_torch_get_device_type", torch.get_device_type) &&
      find(cpu, "aoti_torch_get_device_index", torch.get_device_index) &&
      find(cpu, "aoti_torch_empty_strided", torch.empty_strided) &&
      find(cpu, "torch_string_c_str", torch.string_c_str) && find(cpu, "torch_delete_string", torch.delete_string);
  const auto constant = [&](const char* name) {
    std::int32_t (*get)() = nullptr;
    found = found && find(cpu, name, get);
    return found ? get() : -1;
  };
  torch.types = {{{constant("aoti_torch_dtype_float32"), kFloat32},
                  {constant("aoti_torch_dtype_float16"), kFloat16},
                  {constant("aoti_torch_dtype_bfloat16"), kBFloat16},
                  {constant("aoti_torch_dtype_float64"), kFloat64},
                  {constant("aoti_torch_dtype_bool"), kBool},
                  {constant("aoti_torch_dtype_int32"), kInt32},
                  {constant("aoti_torch_dtype_int64"), kInt64}}};
  torch.cpu_device = constant("aoti_torch_device_type_cpu");
  torch.cuda_device = constant("aoti_torch_device_type_cuda");
  if (!found) return std::nullopt;
  find_requires_grad(cpu, torch);
  find_gil(torch);
  if (void* gpu = ::dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD); gpu != nullptr) {
    find(gpu, "aoti_torch_get_current_cuda_stream", torch.get_current_cuda_stream);
  }
  return torch;
}

// Looked up once, before kernels are registered, which use it without asking.
const Torch* found_torch = nullptr;
const Torch& torch() { return *found_torch; }

// An error for PyTorch to raise in Python under its own type; in C++ it is a std::runtime_error.
class __attribute__((visibility("default"))) PythonError final : public pybind11::builtin_exception {
 public:
  explicit PythonError(const tvm::ffi::Error& error)
      : builtin_exception(std::string(error.message())), kind_(error.kind()) {}

  void set_error() const override {
    void (*set)(void* type, const char* text) = nullptr;
    void** type = nullptr;
    find(RTLD_DEFAULT, "PyErr_SetString", set);
    if (!find(RTLD_DEFAULT, ("PyExc_" + kind_).c_str(), type)) find(RTLD_DEFAULT, "PyExc_RuntimeError", type);
    set(*type, what());
  }

 private:
  std::string kind_;
};

[[noreturn]] void refuse(const char* what) {
  throw ValueError(std::string(what) + " cannot be taken over: PyTorch does not give its memory.");
}
inline void check(int status, const char* what) {
  if (status != 0) refuse(what);
}

// A tensor of PyTorch that belongs to the kernel.
class Held {
 public:
  explicit Held(TensorHandle handle = nullptr) : handle_(handle) {}
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { reset(); }

  void reset() {
    if (handle_ != nullptr) torch().delete_tensor_object(std::exchange(handle_, nullptr));
  }
  TensorHandle* receive() { return &handle_; }
  [[nodiscard]] StableIValue release() { return std::bit_cast<StableIValue>(std::exchange(handle_, nullptr)); }
  [[nodiscard]] StableIValue another() const {
    TensorHandle made = nullptr;
    check(torch().new_tensor_handle(handle_, &made), "A tensor");
    return std::bit_cast<StableIValue>(made);
  }

  // `what` names it in errors.
  [[nodiscard]] void* data(const char* what) const {
    void* data = nullptr;
    check(torch().get_data_ptr(handle_, &data), what);
    return data;
  }
  // The same memory.
  [[nodiscard]] Tensor view(const char* what) const {
    std::int64_t rank = 0;
    std::int64_t* sizes = nullptr;
    std::int64_t* strides = nullptr;
    std::int32_t dtype = 0;
    check(torch().get_dim(handle_, &rank), what);
    check(torch().get_sizes(handle_, &sizes), what);
    check(torch().get_strides(handle_, &strides), what);
    check(torch().get_dtype(handle_, &dtype), what);
    const auto count = static_cast<std::size_t>(rank);
    return wrap(data(what), {sizes, count}, dtype_of(dtype, what), {strides, count}, device());
  }
  [[nodiscard]] bool requires_grad() const { return torch().requires_grad(implementation_of(handle_)); }
  [[nodiscard]] DLDevice device() const {
    std::int32_t type = 0;
    std::int32_t index = 0;
    torch().get_device_type(handle_, &type);
    torch().get_device_index(handle_, &index);
    return type == torch().cuda_device ? DLDevice{kDLCUDA, index} : DLDevice(kCpu);
  }

 private:
  static DLDataType dtype_of(std::int32_t dtype, const char* what) {
    for (const Torch::Type& type : torch().types) {
      if (type.torch == dtype) return type.dtype;
    }
    throw ValueError(std::string(what) + " has a dtype that no back end takes. Give float32, float16 or bfloat16.");
  }

  TensorHandle handle_;
};

std::string take_string(StableIValue value) {
  void* handle = std::bit_cast<void*>(value);
  const char* text = "";
  torch().string_c_str(handle, &text);
  std::string result = text;
  torch().delete_string(handle);
  return result;
}

std::optional<double> take_optional_double(StableIValue value) {
  const std::unique_ptr<StableIValue> box(std::bit_cast<StableIValue*>(value));
  return box == nullptr ? std::nullopt : std::optional(std::bit_cast<double>(*box));
}

// A thread of Python's has the GIL, which PyTorch gave up for the operator, as long as this lives: what is ended
// meanwhile does not take it one by one.
class GilScope {
 public:
  GilScope() : has_it_(torch().python_thread != nullptr && torch().python_thread() != nullptr) {
    if (has_it_) before_ = torch().take_gil();
  }
  GilScope(const GilScope&) = delete;
  GilScope& operator=(const GilScope&) = delete;
  ~GilScope() {
    if (has_it_) torch().give_gil(before_);
  }

 private:
  bool has_it_;
  int before_ = 0;
};

// Takes what the dispatcher gives, in the order of torch_ops.py's schema, all of it before anything can fail.
struct Arguments {
  explicit Arguments(const StableIValue* stack)
      : query(std::bit_cast<TensorHandle>(stack[0])),
        key(std::bit_cast<TensorHandle>(stack[1])),
        value(std::bit_cast<TensorHandle>(stack[2])),
        backend(take_string(stack[3])),
        softmax_scale(take_optional_double(stack[4])),
        causal((stack[5] & 1) != 0),
        backend_kwargs(take_string(stack[6])),
        max_error(take_optional_double(stack[7])) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() {
    const GilScope gil;
    query.reset();
    key.reset();
    value.reset();
  }

  Held query;
  Held key;
  Held value;
  std::string backend;
  std::optional<double> softmax_scale;
  bool causal;
  std::string backend_kwargs;
  std::optional<double> max_error;
};

// PyTorch's current stream of a device is this thread's, as long as this lives.
class StreamScope {
 public:
  explicit StreamScope(DLDevice device) : device_(device) {
    if (device.device_type != kDLCUDA || torch().get_current_cuda_stream == nullptr) return;
    void* stream = nullptr;
    torch().get_current_cuda_stream(device.device_id, &stream);
    TVMFFIEnvSetStream(device.device_type, device.device_id, stream, &before_);
    is_set_ = true;
  }
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;
  ~StreamScope() {
    if (is_set_) TVMFFIEnvSetStream(device_.device_type, device_.device_id, before_, nullptr);
  }

 private:
  DLDevice device_;
  TVMFFIStreamHandle before_ = nullptr;
  bool is_set_ = false;
};

constexpr const char* kForwardOnly =
    "it requires a gradient, and ditattn is forward only: call under torch.no_grad(), or give .detach()";

// Which of the three requires a gradient; -1 for none.
std::int64_t which_requires_gradient(const Arguments& arguments) {
  if (torch().requires_grad != nullptr) {
    if (arguments.query.requires_grad()) return 0;
    if (arguments.key.requires_grad()) return 1;
    return arguments.value.requires_grad() ? 2 : -1;
  }
  std::array<StableIValue, 3> stack{arguments.query.another(), arguments.key.another(), arguments.value.another()};
  check(torch().call_dispatcher("ditattn::requires_gradient", "", stack.data(), kInterface), "A tensor");
  return static_cast<std::int64_t>(stack[0]);
}

void refuse_gradients(const Arguments& arguments) {
  if (!torch().grad_mode_is_enabled()) return;
  const std::int64_t which = which_requires_gradient(arguments);
  if (which < 0) return;
  throw NotImplementedError(std::string(which == 0   ? "query"
                                        : which == 1 ? "key"
                                                     : "value") +
                            " cannot be taken over: " + kForwardOnly);
}

// A new contiguous tensor of PyTorch's, float32 or of `like`'s dtype, on `like`'s device; returns a view of it.
Tensor make(std::span<const std::int64_t> shape, const Tensor& like, bool is_float32, Held& made) {
  std::array<std::int64_t, 4> strides{};
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0; step *= std::max<std::int64_t>(shape[i], 1)) strides[i] = step;
  const DLDataType dtype = is_float32 ? kFloat32 : like.dtype();
  const auto type = std::ranges::find(torch().types, dtype, &Torch::Type::dtype);
  const DLDevice device = like.device();
  const std::int32_t device_type = device.device_type == kDLCUDA ? torch().cuda_device : torch().cpu_device;
  if (torch().empty_strided(static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(), type->torch,
                            device_type, device.device_id, made.receive()) != 0) {
    throw MemoryError("There is no memory for a tensor of shape " + shape_name(shape) + " and dtype " +
                      dtype_name(dtype) + " on " + device_name(device) + ".");
  }
  return wrap(made.data("out"), shape, dtype, std::span(strides).first(shape.size()), device);
}

void run(const Arguments& arguments, Held& out, Held* lse) {
  refuse_gradients(arguments);
  const Tensor query = arguments.query.view("query");
  const Tensor key = arguments.key.view("key");
  const Tensor value = arguments.value.view("value");
  const StreamScope stream(query.device());
  ForwardOutputs outputs;
  if (query.ndim() == 4) {  // else refused below
    outputs.out = make(query.shape(), query, false, out);
    if (lse != nullptr) outputs.lse = make(std::array{query.size(0), query.size(2), query.size(1)}, query, true, *lse);
  }
  attention(query, key, value,
            {.backend = arguments.backend,
             .softmax_scale = arguments.softmax_scale,
             .causal = arguments.causal,
             .max_error = arguments.max_error,
             .backend_kwargs = kwargs_from_json(arguments.backend_kwargs)},
            {}, outputs);
}

template <bool kReturnsLse>
void kernel(StableIValue* stack, std::uint64_t /*num_arguments*/, std::uint64_t /*num_results*/) {
  const Arguments arguments(stack);
  Held out;
  Held lse;
  try {
    run(arguments, out, kReturnsLse ? &lse : nullptr);
  } catch (const tvm::ffi::Error& error) {
    throw PythonError(error);
  }
  stack[0] = out.release();
  if constexpr (kReturnsLse) stack[1] = lse.release();
}

// Registers the kernels of operators that torch_ops.py has defined; false where this PyTorch has no such interface.
bool register_torch_kernels() {
  static const std::optional<Torch> found = find_torch();
  if (!found) return false;
  found_torch = &*found;
  for (const char* key : {"CPU", "CUDA"}) {
    LibraryHandle library = nullptr;  // PyTorch's for ever
    if (torch().begin_registration("ditattn", key, __FILE__, __LINE__, &library) != 0 ||
        torch().register_kernel(library, "attention", kernel<false>, kInterface) != 0 ||
        torch().register_kernel(library, "attention_with_lse", kernel<true>, kInterface) != 0) {
      return false;
    }
  }
  return true;
}

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("ditattn.register_torch_kernels", register_torch_kernels)
      .def("ditattn.forward_only", [] { return tvm::ffi::String(kForwardOnly); });
}

}  // namespace
}  // namespace ditattn::python
