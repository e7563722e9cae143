// The calls of attention: "ditattn.forward" of a layer, and "ditattn.attention", behind `ditattn.attention` and
// `torch.ops.ditattn`.

#include "attention.hpp"

#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include <array>

#include "ditattn/attention.hpp"
#include "ditattn/errors.hpp"
#include "objects.hpp"

namespace ditattn::python {
namespace {

namespace refl = tvm::ffi::reflection;
using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Array;
using tvm::ffi::Optional;
using tvm::ffi::PackedArgs;
using tvm::ffi::String;

// New memory. A GPU's comes from the array library that lent its allocator for this call, as PyTorch does: its cache is
// warm, and graphs may be captured over it. For host memory our own is faster.
Tensor new_tensor(std::span<const std::int64_t> shape, DLDataType dtype, DLDevice device) {
  if (device.device_type == kDLCPU || TVMFFIEnvGetDLPackManagedTensorAllocator() == nullptr)
    return empty(shape, dtype, device);
  try {
    return Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {shape.data(), shape.size()}, dtype, device);
  } catch (const tvm::ffi::Error& error) {
    throw MemoryError("There is no memory for a tensor of shape " + shape_name(shape) + " on " + device_name(device) +
                      ": " + std::string(error.message()));
  }
}

}  // namespace

ForwardOutputs outputs_for(const Tensor& query, const AttentionMetadata& metadata, const Optional<Tensor>& out,
                           const Optional<Tensor>& lse, bool return_lse) {
  ForwardOutputs outputs{.out = out.value_or(Tensor()), .lse = lse.value_or(Tensor())};
  if (!query.defined() || query.ndim() != 4) return outputs;
  std::int64_t rows = query.size(1);
  if (metadata.defined() && metadata->fields.joint_query.has_value()) {
    const Tensor joint = metadata->fields.joint_query.value();
    if (joint.ndim() != 4) return outputs;
    rows += joint.size(1);
  }
  if (!outputs.out.defined()) {
    outputs.out =
        new_tensor(std::array{query.size(0), rows, query.size(2), query.size(3)}, query.dtype(), query.device());
  }
  if (return_lse && !outputs.lse.defined()) {
    outputs.lse = new_tensor(std::array{query.size(0), query.size(2), rows}, kFloat32, query.device());
  }
  return outputs;
}

Any results_of(const Tensor& out, const ForwardOutputs& outputs, bool return_lse) {
  if (!return_lse) return out;
  return Array<Tensor>{out, outputs.lse};
}

namespace {

Any forward(const ImplRef& impl, const Tensor& query, const Tensor& key, const Tensor& value,
            const AttentionMetadata& metadata, const Optional<Tensor>& out, const Optional<Tensor>& lse,
            bool return_lse) {
  const ForwardOutputs outputs = outputs_for(query, metadata, out, lse, return_lse);
  return results_of(impl->impl->forward(query, key, value, metadata, outputs), outputs, return_lse);
}

// The arguments behind query, key and value, any number of them: PyTorch leaves out those at the end that are as by
// default.
struct CallArguments {
  AttentionMetadata metadata;
  AttentionOptions options;
  Optional<Tensor> out;
  Optional<Tensor> lse;
  bool return_lse = false;

  explicit CallArguments(const PackedArgs& args) {
    int next = 3;
    const auto given = [&] { return next < args.size(); };
    if (given()) metadata = args[next++].cast<AttentionMetadata>();
    if (given()) set_backend(args[next++]);
    if (given()) options.softmax_scale = number_or_none(args[next++]);
    if (given()) options.causal = args[next++].cast<bool>();
    if (given()) set_kwargs(args[next++]);
    if (given()) options.max_error = number_or_none(args[next++]);
    if (given()) options.role = args[next++].cast<String>();
    if (given()) options.role_category = args[next++].cast<String>();
    if (given()) options.config = config_from(args[next++].cast<Dict>());
    if (given()) out = args[next++].cast<Optional<Tensor>>();
    if (given()) lse = args[next++].cast<Optional<Tensor>>();
    if (given()) return_lse = args[next++].cast<bool>();
  }

 private:
  static std::optional<double> number_or_none(const AnyView& given) {
    const auto number = given.cast<Optional<double>>();
    return number.has_value() ? std::optional(number.value()) : std::nullopt;
  }
  void set_backend(const AnyView& given) {
    if (const auto backend = given.as<BackendRef>()) {
      options.backend_class = (*backend)->backend;
    } else {
      options.backend = given.cast<String>();
    }
  }
  void set_kwargs(const AnyView& given) {  // a JSON text in PyTorch's operators
    const auto map = given.as<BackendKwargs>();
    options.backend_kwargs = map ? *map : kwargs_from_json(given.cast<String>());
  }
};

void attention_packed(PackedArgs args, Any* result) {
  const auto query = args[0].cast<Tensor>();
  const CallArguments call(args);
  const ForwardOutputs outputs = outputs_for(query, call.metadata, call.out, call.lse, call.return_lse);
  const Tensor out =
      attention(query, args[1].cast<Tensor>(), args[2].cast<Tensor>(), call.options, call.metadata, outputs);
  *result = results_of(out, outputs, call.return_lse);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  refl::GlobalDef().def("ditattn.forward", forward).def_packed("ditattn.attention", attention_packed);
}

}  // namespace
}  // namespace ditattn::python
