#pragma once

/// For authors of plug-ins. A plug-in is a tvm-ffi module file `package/module.so` on the search path with one export,
/// `ditattn_backend(class_name)`, that returns a table of functions (docs/plugins.md), or None for a class the module
/// does not have. In C++:
///
///     static ditattn::BackendClass find(std::string_view name) {
///       return name == "MyBackend" ? std::make_shared<MyBackend>() : nullptr;
///     }
///     DITATTN_EXPORT_BACKENDS(find)

#include <tvm/ffi/any.h>
#include <tvm/ffi/function.h>

#include <string_view>

#include "ditattn/backend.hpp"
#include "ditattn/export.hpp"
#include "ditattn/version.hpp"

namespace ditattn {

/// From a class name to the class; null if there is none of that name.
using FindBackend = BackendClass (*)(std::string_view class_name);

/// The table of functions for `find(class_name)`: a map from names to functions, None where `find` returns null.
/// `interface_version` is the caller's own DITATTN_INTERFACE_VERSION.
DITATTN_API tvm::ffi::Any backend_table(FindBackend find, std::string_view class_name, int interface_version);

/// Links a module into the process: its classes are then found as `module_path + "." + class_name`, through the same
/// table as a plug-in file's. For programs that ship without plug-in files.
DITATTN_API void link_backend_module(const std::string& module_path, FindBackend find);

/// Body of the exported symbol: everything thrown becomes a tvm-ffi error, not only std::exception.
DITATTN_API int export_backend_table(FindBackend find, int interface_version, const TVMFFIAny* args, int num_args,
                                     TVMFFIAny* result) noexcept;

}  // namespace ditattn

#define DITATTN_EXPORT_BACKENDS(find)                                                                       \
  extern "C" DITATTN_API int __tvm_ffi_ditattn_backend(void* /*self*/, const TVMFFIAny* args, int num_args, \
                                                       TVMFFIAny* result) {                                 \
    return ::ditattn::export_backend_table(find, DITATTN_INTERFACE_VERSION, args, num_args, result);        \
  }
