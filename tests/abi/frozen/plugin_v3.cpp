// A plug-in for interface version 3 as docs/plugins.md has it, frozen: what an author wrote long ago against tvm-ffi
// alone, without a header of this library. It is never changed; another interface version gets a file of its own.
//
// Source and not a binary: nothing but tvm-ffi's C interface is between it and the library, and that a compiled file of
// today and of then call the same functions in the same way is what the literals below say.

#include <tvm/ffi/tvm_ffi.h>

#include <cmath>

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::ObjectRef;
using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::Tensor;

namespace {

// The mean of all values, which is attention where the query is zero. Contiguous float32 on the CPU.
void forward(const Tensor& /*query*/, const Tensor& /*key*/, const Tensor& value, const Tensor& out,
             const Optional<Tensor>& lse, const Any& /*metadata*/) {
  const std::int64_t heads = out.size(2), size = out.size(3), rows = out.size(1), keys = value.size(1);
  for (std::int64_t b = 0; b < out.size(0); ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t d = 0; d < size; ++d) {
        double sum = 0;
        for (std::int64_t k = 0; k < keys; ++k) {
          sum += static_cast<const float*>(value.data_ptr())[((b * keys + k) * heads + h) * size + d];
        }
        for (std::int64_t r = 0; r < rows; ++r) {
          static_cast<float*>(out.data_ptr())[((b * rows + r) * heads + h) * size + d] =
              static_cast<float>(sum / static_cast<double>(keys));
        }
      }
    }
  }
  if (!lse.has_value()) return;
  for (std::int64_t i = 0; i < lse.value().numel(); ++i) {
    static_cast<float*>(lse.value().data_ptr())[i] = std::log(static_cast<float>(keys));
  }
}

Function create(std::int64_t num_heads, std::int64_t head_size, const Optional<double>& softmax_scale, bool causal,
                const Optional<std::int64_t>& num_kv_heads, const String& prefix, const Map<String, Any>& kwargs) {
  if (prefix == "refused") {
    TVM_FFI_THROW(ValueError) << num_heads << " " << head_size << " " << softmax_scale.has_value() << " " << causal
                              << " " << num_kv_heads.has_value() << " " << kwargs.size();
  }
  return Function::FromTyped(forward);
}

Any explain(std::int64_t batch, std::int64_t /*num_heads*/, std::int64_t /*num_kv_heads*/, std::int64_t /*seq_q*/,
            std::int64_t /*seq_kv*/, std::int64_t /*head_size*/, DLDataType dtype, DLDevice device,
            std::int64_t mask_kind, std::int64_t features, std::int64_t alignment) {
  if (dtype.bits == 32 && device.device_type == kDLCPU && mask_kind == 0 && (features & ~2) == 0 && alignment >= 0 &&
      batch < 100) {
    return Any(nullptr);
  }
  return Array<String>{String("batch " + std::to_string(batch)), String("mask " + std::to_string(mask_kind)),
                       String("features " + std::to_string(features))};
}

Any table(const String& class_name) {
  if (class_name != "Mean") return Any(nullptr);
  return Map<String, Any>{{"interface_version", std::int64_t{3}},
                          {"get_name", Function::FromTyped([] { return String("MEAN"); })},
                          {"capabilities", Function::FromTyped([] {
                             return Map<String, Any>{{"engine", String("frozen")},
                                                     {"devices", Array<String>{String("cpu")}},
                                                     {"dtypes", Array<String>{String("float32")}},
                                                     {"head_size_min", std::int64_t{1}},
                                                     {"head_size_max", std::int64_t{512}},
                                                     {"lse", true}};
                           })},
                          {"validate_available", Function::FromTyped([] {})},
                          {"known_kwargs", Function::FromTyped([] { return Array<String>{String("*")}; })},
                          {"explain", Function::FromTyped(explain)},
                          {"create", Function::FromTyped(create)}};
}

}  // namespace

extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_ditattn_backend(void* /*self*/, const TVMFFIAny* args, int /*num_args*/,
                                                            TVMFFIAny* result) {
  TVM_FFI_SAFE_CALL_BEGIN();
  *reinterpret_cast<Any*>(result) = table(reinterpret_cast<const AnyView*>(args)->cast<String>());
  TVM_FFI_SAFE_CALL_END();
}
