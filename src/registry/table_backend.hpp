#pragma once

#include <tvm/ffi/any.h>

#include <string>

#include "ditattn/backend.hpp"
#include "ditattn/errors.hpp"

namespace ditattn {

/// Names of the functions a backend's table must have (docs/plugins.md says what each takes and returns).
inline constexpr const char* kTableFunctions[] = {"get_name", "capabilities", "validate_available",
                                                  "explain",  "known_kwargs", "create"};

/// A backend class over a plug-in's table of functions. ImportError, naming `origin`, where the table has another
/// interface version or lacks a function.
BackendClass backend_from_table(const tvm::ffi::Any& table, const std::string& origin);

/// Capabilities as they cross the table, and back.
tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any> capabilities_to_map(const Capabilities& can);
Capabilities capabilities_from_map(const tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>& map);

/// Reaches what only the library may call.
struct BackendAccess {
  static std::unique_ptr<AttentionImpl> create(const BackendClass& backend, const ImplConfig& config);
  static std::vector<std::string> known_kwargs(const AttentionBackend& backend) { return backend.known_kwargs(); }
};

/// Calls `function` and turns whatever it throws into a `ditattn::Error` of the same kind; things that are not
/// exceptions too.
template <class Function>
auto guard(const std::string& origin, Function&& function) {
  try {
    return function();
  } catch (const Error&) {
    throw;
  } catch (const tvm::ffi::Error& error) {
    rethrow(error);
  } catch (const std::exception& error) {
    throw Error("RuntimeError", origin + " threw: " + error.what());
  } catch (...) {
    throw Error("RuntimeError", origin + " threw something that is not a std::exception");
  }
}

}  // namespace ditattn
