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

#include <functional>
#include <string>
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

/// The way back: a class over a table of functions, as `backend_table` or a module in another language makes it.
/// `origin` names it in errors. ImportError where the table has another interface version or lacks a function.
DITATTN_API BackendClass backend_from_table(const tvm::ffi::Any& table, const std::string& origin);

/// Finds classes that are in no file, for a host with modules of its own, such as Python: the class of that path, null
/// where there is no such module, or ImportError with the reason (no such class in it; failed to load, and why).
using ClassImporter = std::function<BackendClass(const std::string& class_path)>;

/// Sets where class paths are looked for last, after plug-in files. `name` stands for it in errors ("importlib"). An
/// empty importer: nowhere. It is called without any lock held, by any thread.
DITATTN_API void set_class_importer(std::string name, ClassImporter importer);

/// Body of the exported symbol: everything thrown becomes a tvm-ffi error, not only std::exception.
DITATTN_API int export_backend_table(FindBackend find, int interface_version, const TVMFFIAny* args, int num_args,
                                     TVMFFIAny* result) noexcept;

}  // namespace ditattn

#define DITATTN_EXPORT_BACKENDS(find)                                                                       \
  extern "C" DITATTN_API int __tvm_ffi_ditattn_backend(void* /*self*/, const TVMFFIAny* args, int num_args, \
                                                       TVMFFIAny* result) {                                 \
    return ::ditattn::export_backend_table(find, DITATTN_INTERFACE_VERSION, args, num_args, result);        \
  }
