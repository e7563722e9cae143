// Tables that are wrong in the way the class name asks for, as a plug-in in another language could give them.

#include <tvm/ffi/container/map.h>

#include "tests/abi/plugins/good_backends.hpp"

using tvm::ffi::Any;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::String;

namespace {

// The good table without, or with another value for, one entry.
Any spoilt_table(const std::string& class_name) {
  auto table = ditattn::backend_table(find_good, "Doubler", DITATTN_INTERFACE_VERSION).cast<Map<String, Any>>();
  const std::string without = "Without_";
  if (class_name.starts_with(without)) {
    table.erase(String(class_name.substr(without.size())));
  } else if (class_name == "TextForFunction") {
    table.Set("create", String("not a function"));
  } else if (class_name == "NameIsANumber") {
    table.Set("get_name", Function::FromTyped([] { return 7; }));
  } else if (class_name == "UnknownDtype") {
    table.Set("capabilities", Function::FromTyped([] {
                return Map<String, Any>{{"dtypes", tvm::ffi::Array<String>{String("float3")}}};
              }));
  } else if (class_name == "CreateGivesText") {
    table.Set("create", Function::FromPacked([](tvm::ffi::PackedArgs, Any* result) { *result = String("text"); }));
  } else if (class_name == "TextForTable") {
    return Any(String("not a table"));
  }
  return Any(table);
}

}  // namespace

extern "C" DITATTN_API int __tvm_ffi_ditattn_backend(void* /*self*/, const TVMFFIAny* args, int /*num_args*/,
                                                     TVMFFIAny* result) {
  TVM_FFI_SAFE_CALL_BEGIN();
  const std::string class_name = reinterpret_cast<const tvm::ffi::AnyView*>(args)->cast<String>();
  *reinterpret_cast<Any*>(result) = spoilt_table(class_name);
  TVM_FFI_SAFE_CALL_END();
}
