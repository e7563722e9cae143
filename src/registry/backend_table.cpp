// The exporting side of a backend's table: from a C++ class to functions (table_backend.cpp is the way back).

#include <fmt/format.h>
#include <tvm/ffi/container/array.h>

#include "ditattn/errors.hpp"
#include "ditattn/plugin.hpp"
#include "registry/launches.hpp"
#include "registry/table_backend.hpp"

namespace ditattn {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::Optional;
using tvm::ffi::String;

template <class T>
std::optional<T> from_optional(const Optional<T>& value) {
  return value.has_value() ? std::optional<T>(value.value()) : std::nullopt;
}

// A table function from a lambda. Callers may be C or Python, which nothing but a tvm-ffi error may reach: whatever
// else is thrown, a plug-in's `throw 42` included, becomes one.
template <class Result, class... Args, class Body>
Function table_function(const std::string& name, Result (Body::*)(Args...) const, Body body) {
  return Function::FromTyped(
      [name, body = std::move(body)](Args... args) -> Result { return guard(name, [&] { return body(args...); }); });
}

template <class Body>
Function table_function(const std::string& name, Body body) {
  return table_function(name, &Body::operator(), std::move(body));
}

Function forward_function(const std::string& name, std::shared_ptr<const AttentionImpl> impl) {
  return table_function(name, [impl = std::move(impl)](const Tensor& query, const Tensor& key, const Tensor& value,
                                                       const Tensor& out, const Optional<Tensor>& lse,
                                                       const AttentionMetadata& metadata) {
    impl->run(
        {.query = query, .key = key, .value = value, .out = out, .lse = lse.value_or(Tensor()), .metadata = metadata});
  });
}

Function create_function(const std::string& name, BackendClass backend) {
  return table_function(name, [name, backend = std::move(backend)](std::int64_t num_heads, std::int64_t head_size,
                                                                   const Optional<double>& softmax_scale, bool causal,
                                                                   const Optional<std::int64_t>& num_kv_heads,
                                                                   const String& prefix, const BackendKwargs& kwargs) {
    return forward_function(name, BackendAccess::create(backend, {.num_heads = num_heads,
                                                                  .head_size = head_size,
                                                                  .softmax_scale = from_optional(softmax_scale),
                                                                  .causal = causal,
                                                                  .num_kv_heads = from_optional(num_kv_heads),
                                                                  .prefix = prefix,
                                                                  .backend_kwargs = kwargs}));
  });
}

// A table function of a problem, from one that gets it whole.
template <class Body>
Function problem_function(const std::string& name, Body body) {
  return table_function(name,
                        [body = std::move(body)](std::int64_t batch, std::int64_t num_heads, std::int64_t num_kv_heads,
                                                 std::int64_t seq_q, std::int64_t seq_kv, std::int64_t head_size,
                                                 DLDataType dtype, DLDevice device, std::int64_t mask,
                                                 std::int64_t features, std::int64_t alignment) -> Any {
                          Problem problem{.batch = batch,
                                          .num_heads = num_heads,
                                          .num_kv_heads = num_kv_heads,
                                          .seq_q = seq_q,
                                          .seq_kv = seq_kv,
                                          .head_size = head_size,
                                          .dtype = dtype,
                                          .device = device,
                                          .mask = static_cast<MaskKind>(mask),
                                          .alignment = alignment};
                          set_problem_features(problem, features);
                          return body(problem);
                        });
}

}  // namespace

std::unique_ptr<AttentionImpl> BackendAccess::create(const BackendClass& backend, const ImplConfig& config) {
  std::unique_ptr<AttentionImpl> impl = backend->create(config);
  impl->backend_ = backend;
  if (impl->is_counted_) impl->launches_ = &launch_counter(config.role, backend->get_name());
  return impl;
}

Any backend_table(FindBackend find, std::string_view class_name, int interface_version) {
  const BackendClass backend = find(class_name);
  if (!backend) return {};
  const std::string name(class_name);
  return Map<String, Any>{
      {"interface_version", static_cast<std::int64_t>(interface_version)},
      {"get_name", table_function(name, [backend] { return String(backend->get_name()); })},
      {"capabilities", table_function(name, [backend] { return capabilities_to_map(backend->capabilities()); })},
      {"validate_available", table_function(name, [backend] { backend->validate_available(); })},
      {"known_kwargs", table_function(name, [backend] { return to_array(BackendAccess::known_kwargs(*backend)); })},
      {"explain", problem_function(name,
                                   [backend](const Problem& problem) {
                                     const Verdict verdict = backend->explain(problem);
                                     return verdict ? Any() : Any(to_array(verdict.reasons));
                                   })},
      {"kernel_name",
       problem_function(name,
                        [backend](const Problem& problem) { return Any(String(backend->kernel_name(problem))); })},
      {"create", create_function(name, backend)},
  };
}

int export_backend_table(FindBackend find, int interface_version, const TVMFFIAny* args, int num_args,
                         TVMFFIAny* result) noexcept {
  try {
    if (num_args != 1) throw Error("TypeError", "ditattn_backend takes one argument, a class name");
    const auto name = reinterpret_cast<const tvm::ffi::AnyView*>(args)->cast<String>();
    *reinterpret_cast<Any*>(result) = backend_table(find, std::string(name), interface_version);
    return 0;
  } catch (const tvm::ffi::Error& error) {
    tvm::ffi::detail::SetSafeCallRaised(error);
  } catch (const std::exception& error) {
    tvm::ffi::detail::SetSafeCallRaised(Error("RuntimeError", error.what()));
  } catch (...) {
    tvm::ffi::detail::SetSafeCallRaised(Error("RuntimeError", "something that is not a std::exception was thrown"));
  }
  return -1;
}

}  // namespace ditattn
