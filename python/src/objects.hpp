#pragma once

/// What crosses to Python beside tensors and metadata: backend classes and implementations, as tvm-ffi objects.

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/string.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ditattn/attention_config.hpp"
#include "ditattn/backend.hpp"
#include "ditattn/tuner.hpp"

namespace ditattn::python {

using Dict = tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any>;

/// Holds a BackendClass.
class BackendObj : public tvm::ffi::Object {
 public:
  explicit BackendObj(BackendClass held) : backend(std::move(held)) {}
  BackendClass backend;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("ditattn.Backend", BackendObj, tvm::ffi::Object);
};

class BackendRef : public tvm::ffi::ObjectRef {
 public:
  explicit BackendRef(BackendClass backend);
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(BackendRef, tvm::ffi::ObjectRef, BackendObj);
};

/// Holds an AttentionImpl.
class ImplObj : public tvm::ffi::Object {
 public:
  explicit ImplObj(std::unique_ptr<AttentionImpl> held) : impl(std::move(held)) {}
  std::unique_ptr<AttentionImpl> impl;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("ditattn.Impl", ImplObj, tvm::ffi::Object);
};

class ImplRef : public tvm::ffi::ObjectRef {
 public:
  explicit ImplRef(std::unique_ptr<AttentionImpl> impl);
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(ImplRef, tvm::ffi::ObjectRef, ImplObj);
};

/// A backend class that is written in Python. What it can do is asked on first use, not when it is registered:
/// decorators run while its module is still being imported.
class PythonBackend final : public AttentionBackend {
 public:
  /// `holder` is the Python object that stands for the class, `describe()` returns its table of functions
  /// (docs/plugins.md) with the list `backend_kwargs` beside them; it throws ImportError where the class is no backend.
  PythonBackend(std::string class_path, tvm::ffi::Any holder, tvm::ffi::Function describe);

  /// Asks now; ImportError.
  void resolve() const { described(); }
  [[nodiscard]] const tvm::ffi::Any& holder() const { return holder_; }

  [[nodiscard]] std::string get_name() const override { return described().table->get_name(); }
  [[nodiscard]] const Capabilities& capabilities() const override { return described().table->capabilities(); }
  void validate_available() const override { described().table->validate_available(); }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    return described().table->make(config);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return described().known_kwargs; }

 private:
  struct Described {
    BackendClass table;
    std::vector<std::string> known_kwargs;
  };
  const Described& described() const;

  std::string class_path_;
  tvm::ffi::Any holder_;
  tvm::ffi::Function describe_;
  mutable std::mutex mutex_;
  mutable std::optional<Described> described_;
};

/// For Python: the holder of a class written in Python, which is asked first whether it is a backend; else a
/// BackendRef.
tvm::ffi::Any to_python(const BackendClass& backend);

/// `Problem` from Python's fields of the same names.
Problem problem_from(const Dict& fields);

/// `AttentionConfig` from {"default": spec or None, "per_role": {role: spec}}; empty: none.
AttentionConfig config_from(const Dict& fields);

/// Options from a JSON object, empty for none: PyTorch's operators know no dictionaries.
BackendKwargs kwargs_from_json(const std::string& text);

/// A list of strings.
tvm::ffi::Array<tvm::ffi::String> strings(const std::vector<std::string>& texts);

/// As `ditattn list --json` has them, and more.
Dict capabilities_dict(const Capabilities& can);

/// A problem's fields, as Python's `Problem` takes them.
Dict problem_dict(const Problem& problem);

/// A measurement's fields, as Python's `TunedResult` takes them.
Dict tuned_result_dict(const TunedResult& result);

/// The entry `key`; none where there is none, or it is None.
template <class T>
std::optional<T> given(const Dict& dict, const char* key) {
  const auto value = dict.Get(tvm::ffi::String(key));
  return value && *value != nullptr ? std::optional(value->template cast<T>()) : std::nullopt;
}

/// The entry `key`, or `fallback`.
template <class T>
T get_or(const Dict& dict, const char* key, T fallback) {
  const auto value = dict.Get(tvm::ffi::String(key));
  return value ? value->template cast<T>() : fallback;
}

}  // namespace ditattn::python
