#include "objects.hpp"

#include <tvm/ffi/extra/json.h>

#include "ditattn/errors.hpp"
#include "ditattn/plugin.hpp"

namespace ditattn::python {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::String;

namespace {

// None for any, a list, or {"min", "max", "multiple"}.
Any head_sizes(const HeadSizes& sizes) {
  if (sizes.any()) return {};
  if (!sizes.list.empty()) return Array<std::int64_t>(sizes.list.begin(), sizes.list.end());
  return Dict{{"min", sizes.min}, {"max", sizes.max == 0 ? Any() : Any(sizes.max)}, {"multiple", sizes.multiple}};
}

AttentionSpec spec_from(const Dict& fields) {
  AttentionSpec spec{.backend = get_or(fields, "backend", String(kAutomatic)),
                     .backend_kwargs = get_or(fields, "backend_kwargs", BackendKwargs())};
  if (const auto policy = given<String>(fields, "on_unusable")) {
    spec.on_unusable = *policy == "warn"    ? OnUnusable::warn
                       : *policy == "allow" ? OnUnusable::allow
                                            : OnUnusable::error;
  }
  for (const String& name : get_or(fields, "allowed", Array<String>())) spec.allowed.push_back(name);
  spec.max_error = given<double>(fields, "max_error");
  return spec;
}

}  // namespace

Array<String> strings(const std::vector<std::string>& texts) {
  Array<String> result;
  for (const std::string& text : texts) result.push_back(String(text));
  return result;
}

BackendRef::BackendRef(BackendClass backend) { data_ = tvm::ffi::make_object<BackendObj>(std::move(backend)); }

ImplRef::ImplRef(std::unique_ptr<AttentionImpl> impl) { data_ = tvm::ffi::make_object<ImplObj>(std::move(impl)); }

PythonBackend::PythonBackend(std::string class_path, Any holder, Function describe)
    : class_path_(std::move(class_path)), holder_(std::move(holder)), describe_(std::move(describe)) {}

// The lock is not held while Python runs: the thread that has Python's lock may be waiting for this one.
const PythonBackend::Described& PythonBackend::described() const {
  {
    std::lock_guard lock(mutex_);
    if (described_) return *described_;
  }
  Described fresh;
  try {
    const Dict table = describe_().cast<Dict>();
    fresh.table = backend_from_table(table, class_path_);
    for (const String& name : get_or(table, "backend_kwargs", Array<String>())) fresh.known_kwargs.push_back(name);
  } catch (const Error&) {
    throw;
  } catch (const tvm::ffi::Error& error) {
    rethrow(error);
  }
  std::lock_guard lock(mutex_);
  if (!described_) described_ = std::move(fresh);
  return *described_;
}

Any to_python(const BackendClass& backend) {
  const auto* python = dynamic_cast<const PythonBackend*>(backend.get());
  if (python == nullptr) return BackendRef(backend);
  python->resolve();
  return python->holder();
}

Problem problem_from(const Dict& fields) {
  return {.batch = get_or<std::int64_t>(fields, "batch", 1),
          .num_heads = get_or<std::int64_t>(fields, "num_heads", 1),
          .num_kv_heads = get_or<std::int64_t>(fields, "num_kv_heads", 1),
          .seq_q = get_or<std::int64_t>(fields, "seq_q", 1),
          .seq_kv = get_or<std::int64_t>(fields, "seq_kv", 1),
          .head_size = get_or<std::int64_t>(fields, "head_size", 1),
          .dtype = parse_dtype(std::string(get_or(fields, "dtype", String("float32")))),
          .device = get_or(fields, "device", DLDevice(kCpu)),
          .mask = parse_mask_kind(std::string(get_or(fields, "mask", String("none")))),
          .causal = get_or(fields, "causal", false),
          .lse = get_or(fields, "lse", false),
          .packed = get_or(fields, "packed", false),
          .joint = get_or(fields, "joint", false),
          .spans = get_or(fields, "spans", false),
          .fp8_kv = get_or(fields, "fp8_kv", false),
          .alignment = get_or<std::int64_t>(fields, "alignment", 16)};
}

Dict problem_dict(const Problem& p) {
  return {{"batch", p.batch},
          {"num_heads", p.num_heads},
          {"num_kv_heads", p.num_kv_heads},
          {"seq_q", p.seq_q},
          {"seq_kv", p.seq_kv},
          {"head_size", p.head_size},
          {"dtype", String(dtype_name(p.dtype))},
          {"device", String(device_name(p.device))},
          {"mask", String(mask_kind_name(p.mask))},
          {"causal", p.causal},
          {"lse", p.lse},
          {"packed", p.packed},
          {"joint", p.joint},
          {"spans", p.spans},
          {"fp8_kv", p.fp8_kv},
          {"alignment", p.alignment}};
}

Dict tuned_result_dict(const TunedResult& result) {
  return {{"backend", String(result.backend)},
          {"class_path", String(result.class_path)},
          {"engine", String(result.engine)},
          {"median_ms", result.median_ms},
          {"error", result.error},
          {"reason", String(result.reason)}};
}

AttentionConfig config_from(const Dict& fields) {
  AttentionConfig config;
  if (const auto spec = given<Dict>(fields, "default")) config.default_spec = spec_from(*spec);
  for (const auto& [role, spec] : get_or(fields, "per_role", Dict()))
    config.per_role[role] = spec_from(spec.cast<Dict>());
  return config;
}

BackendKwargs kwargs_from_json(const std::string& text) {
  if (text.empty()) return {};
  String error;
  const Any parsed = tvm::ffi::json::Parse(text, &error);
  const auto object = parsed.as<tvm::ffi::Map<Any, Any>>();
  if (!error.empty() || !object) {
    throw ValueError("backend_kwargs must be a JSON object such as {\"smooth_k\": false}, got '" + text + "'" +
                     (error.empty() ? "" : ": " + std::string(error)) + ".");
  }
  BackendKwargs kwargs;
  for (const auto& [key, value] : *object) kwargs.Set(key.cast<String>(), value);
  return kwargs;
}

Dict capabilities_dict(const Capabilities& can) {
  Array<String> dtypes;
  for (DLDataType dtype : can.dtypes) dtypes.push_back(dtype_name(dtype));
  return {{"engine", String(can.engine)},
          {"devices", strings(can.devices)},
          {"dtypes", dtypes},
          {"head_sizes", head_sizes(can.head_sizes)},
          {"masks", strings(can.masks)},
          {"gqa", can.gqa},
          {"causal", can.causal},
          {"causal_top_left", can.causal_alignment == CausalAlignment::top_left},
          {"lse", can.lse},
          {"packed", can.packed},
          {"joint", can.joint},
          {"fp8_kv", can.fp8_kv},
          {"graph_safe", can.graph_safe},
          {"masked_nan_propagates", can.masked_nan_propagates},
          {"alignment", can.alignment}};
}

}  // namespace ditattn::python
