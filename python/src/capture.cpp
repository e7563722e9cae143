// What python/ditattn/capture.py needs: to see calls, to copy tensors to the host, to write a file.

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <memory>
#include <optional>
#include <vector>

#include "ditattn/cuda.hpp"
#include "ditattn/observer.hpp"
#include "ditattn/safetensors.hpp"
#include "objects.hpp"

namespace ditattn::python {
namespace {

namespace refl = tvm::ffi::reflection;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;

// Calls `before(query, key, value, metadata, layer)`, `layer` being a dict.
class PythonObserver final : public ForwardObserver {
 public:
  explicit PythonObserver(Function before) : before_(std::move(before)) {}

  void before(const ForwardEvent& event) override {
    const AttentionImpl& impl = event.impl;
    const Dict layer{{"backend", String(impl.backend().get_name())},
                     {"prefix", String(impl.config().prefix)},
                     {"role", String(impl.config().role)},
                     {"causal", impl.config().causal},
                     {"softmax_scale", impl.softmax_scale()}};
    before_(event.call.query, event.call.key, event.call.value, event.call.metadata, layer);
  }

 private:
  Function before_;
};

// Returns the function that ends it.
Function observe(const Function& before) {
  const auto observation =
      std::make_shared<std::optional<ForwardObservation>>(std::in_place, std::make_shared<PythonObserver>(before));
  return Function::FromTyped([observation] { observation->reset(); });
}

// A view in which dimensions that repeat one element have it once. The caller keeps `tensor` alive.
Tensor without_broadcasting(const Tensor& tensor) {
  std::vector<std::int64_t> shape(tensor.shape().begin(), tensor.shape().end());
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] > 1 && tensor.stride(static_cast<std::int64_t>(i)) == 0) shape[i] = 1;
  }
  const std::vector<std::int64_t> strides(tensor.strides().begin(), tensor.strides().end());
  return wrap(data_pointer(tensor), shape, tensor.dtype(), strides, tensor.device());
}

void save(const String& file, const Map<String, Tensor>& tensors, const Map<String, String>& metadata) {
  SafetensorsFile content;
  for (const auto& [name, tensor] : tensors) content.tensors.emplace(name, tensor);
  for (const auto& [name, text] : metadata) content.metadata.emplace(name, text);
  save_safetensors(std::string(file), content);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  refl::GlobalDef()
      .def("ditattn.observe", observe)
      .def("ditattn.without_broadcasting", without_broadcasting)
      .def("ditattn.copy_to_host", [](const Tensor& tensor) { return copy_to(tensor, kCpu); })
      .def("ditattn.empty_on_host",
           [](const Tensor& like) { return empty(std::span(like.shape().data(), like.shape().size()), like.dtype()); })
      .def("ditattn.save_safetensors", save);
}

}  // namespace
}  // namespace ditattn::python
