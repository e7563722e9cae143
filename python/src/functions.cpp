// The library as tvm-ffi functions "ditattn.*", which python/ditattn calls. Members go by name.

#include <dlfcn.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/reflection/registry.h>

#include <cstring>
#include <filesystem>

#include "ditattn/ditattn.hpp"
#include "ditattn/plugin.hpp"
#include "objects.hpp"

namespace ditattn::python {
namespace {

namespace refl = tvm::ffi::reflection;
using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::String;
using Enum = DiffusionAttentionBackendEnum;

template <class T>
std::optional<T> to_std(const Optional<T>& value) {
  return value.has_value() ? std::optional<T>(value.value()) : std::nullopt;
}

Array<String> names_of(const std::vector<Enum>& members) {
  Array<String> names;
  for (Enum member : members) names.push_back(member.name());
  return names;
}

// --- Registry ---------------------------------------------------------------------------------------------------

void set_importer(const Optional<Function>& import) {
  if (!import.has_value()) return set_class_importer("importlib", {});
  set_class_importer("importlib", [import = import.value()](const std::string& class_path) -> BackendClass {
    const Any found = import(String(class_path));
    if (found == nullptr) return nullptr;
    BackendClass backend = found.cast<BackendRef>()->backend;
    if (const auto* python = dynamic_cast<const PythonBackend*>(backend.get())) python->resolve();
    return backend;
  });
}

void set_log(const Optional<Function>& handler) {
  if (!handler.has_value()) return set_log_handler({});
  set_log_handler([handler = handler.value()](LogLevel level, std::string_view message) {
    try {
      handler(static_cast<std::int64_t>(level), String(message.data(), message.size()));
    } catch (const tvm::ffi::Error&) {  // a message must not become an error of what it tells about
    }
  });
}

void define_registry() {
  refl::GlobalDef()
      .def("ditattn.members", [] { return names_of(Enum::members()); })
      .def("ditattn.from_name", [](const std::string& name) { return String(Enum::from_name(name).name()); })
      .def("ditattn.define",
           [](const std::string& name, const std::string& path) { static_cast<void>(Enum::define(name, path)); })
      .def("ditattn.value", [](const std::string& name) { return String(Enum::from_name(name).value()); })
      .def("ditattn.get_path",
           [](const std::string& name, bool include_classname) {
             return String(Enum::from_name(name).get_path(include_classname));
           })
      .def("ditattn.get_class", [](const std::string& name) { return to_python(Enum::from_name(name).get_class()); })
      .def("ditattn.is_overridden", [](const std::string& name) { return Enum::from_name(name).is_overridden(); })
      .def("ditattn.clear_override", [](const std::string& name) { Enum::from_name(name).clear_override(); })
      .def("ditattn.override_path",
           [](const std::string& name, const std::string& path) {
             static_cast<void>(register_diffusion_backend(Enum::from_name(name), path));
           })
      .def("ditattn.resolve_class_path", [](const String& path) { return to_python(resolve_class_path(path)); })
      .def("ditattn.python_backend",
           [](const String& path, const Any& holder, const Function& describe) {
             return BackendRef(std::make_shared<PythonBackend>(path, holder, describe));
           })
      .def("ditattn.register_backend_class",
           [](const String& path, const BackendRef& backend) { register_backend_class(path, backend->backend); })
      .def("ditattn.plugin_search_path", [] { return strings(plugin_search_path()); })
      .def("ditattn.set_importer", set_importer)
      .def("ditattn.set_log_handler", set_log);
}

// --- Classes and implementations --------------------------------------------------------------------------------

ImplRef make(const BackendRef& backend, std::int64_t num_heads, std::int64_t head_size, const Optional<double>& scale,
             bool causal, const Optional<std::int64_t>& num_kv_heads, const String& prefix, const BackendKwargs& kwargs,
             const String& role) {
  return ImplRef(backend->backend->make({.num_heads = num_heads,
                                         .head_size = head_size,
                                         .softmax_scale = to_std(scale),
                                         .causal = causal,
                                         .num_kv_heads = to_std(num_kv_heads),
                                         .prefix = prefix,
                                         .role = role,
                                         .backend_kwargs = kwargs}));
}

void define_backends() {
  refl::ObjectDef<BackendObj>();
  refl::ObjectDef<ImplObj>();
  refl::GlobalDef()
      .def("ditattn.address",
           [](const BackendRef& backend) { return reinterpret_cast<std::int64_t>(backend->backend.get()); })
      .def("ditattn.get_name", [](const BackendRef& backend) { return String(backend->backend->get_name()); })
      .def("ditattn.get_supported_head_sizes",
           [](const BackendRef& backend) {
             const std::vector<std::int64_t> sizes = backend->backend->get_supported_head_sizes();
             return Array<std::int64_t>(sizes.begin(), sizes.end());
           })
      .def("ditattn.supports_head_size",
           [](const BackendRef& backend, std::int64_t size) { return backend->backend->supports_head_size(size); })
      .def("ditattn.supports_attention_mask",
           [](const BackendRef& backend) { return backend->backend->supports_attention_mask(); })
      .def("ditattn.supports_piecewise_spans",
           [](const BackendRef& backend) { return backend->backend->supports_piecewise_spans(); })
      .def("ditattn.validate_available", [](const BackendRef& backend) { backend->backend->validate_available(); })
      .def("ditattn.capabilities",
           [](const BackendRef& backend) { return capabilities_dict(backend->backend->capabilities()); })
      .def("ditattn.explain",
           [](const BackendRef& backend, const Dict& problem) {
             return strings(backend->backend->explain(problem_from(problem)).reasons);
           })
      .def("ditattn.kernel_name",
           [](const BackendRef& backend, const Dict& problem) {
             return String(backend->backend->kernel_name(problem_from(problem)));
           })
      .def("ditattn.make", make);
}

// --- Metadata ---------------------------------------------------------------------------------------------------

using Spans = Array<Array<Array<std::int64_t>>>;

std::int64_t at(const Array<std::int64_t>& numbers, std::size_t index, std::size_t count, const char* what) {
  if (numbers.size() == count) return numbers[static_cast<std::int64_t>(index)];
  throw ValueError(std::string(what) + " has an entry of " + std::to_string(numbers.size()) + " numbers, expected " +
                   std::to_string(count) + ".");
}

AttentionMetadata make_metadata(const Optional<Tensor>& attn_mask, const Optional<Tensor>& joint_attn_mask,
                                const Optional<Tensor>& joint_query, const Optional<Tensor>& joint_key,
                                const Optional<Tensor>& joint_value, const String& joint_strategy,
                                const Optional<Spans>& spans, const Array<Array<std::int64_t>>& ranges,
                                const MetadataExtra& extra) {
  AttentionMetadataFields fields{.attn_mask = attn_mask,
                                 .joint_query = joint_query,
                                 .joint_key = joint_key,
                                 .joint_value = joint_value,
                                 .joint_attn_mask = joint_attn_mask,
                                 .joint_strategy = joint_strategy,
                                 .extra = extra};
  if (spans.has_value()) {
    fields.full_attn_spans.emplace();
    for (const Array<Array<std::int64_t>>& sample : spans.value()) {
      std::vector<Span>& list = fields.full_attn_spans->emplace_back();
      for (const Array<std::int64_t>& span : sample) {
        list.push_back({at(span, 0, 2, "full_attn_spans"), at(span, 1, 2, "full_attn_spans")});
      }
    }
  }
  for (const Array<std::int64_t>& range : ranges) {
    const auto number = [&](std::size_t index) { return at(range, index, 3, "query_ranges"); };
    fields.query_ranges.push_back({number(0), number(1), number(2)});
  }
  return AttentionMetadata(std::move(fields));
}

// The way back, for backends written in Python.
Dict metadata_fields(const AttentionMetadata& metadata) {
  const AttentionMetadataFields& fields = metadata->fields;
  Dict result{{"attn_mask", fields.attn_mask},
              {"joint_attn_mask", fields.joint_attn_mask},
              {"joint_query", fields.joint_query},
              {"joint_key", fields.joint_key},
              {"joint_value", fields.joint_value},
              {"joint_strategy", String(fields.joint_strategy)},
              {"extra", fields.extra}};
  if (fields.full_attn_spans) {
    Spans spans;
    for (const std::vector<Span>& sample : *fields.full_attn_spans) {
      Array<Array<std::int64_t>> list;
      for (const Span& span : sample) list.push_back({span.begin, span.end});
      spans.push_back(list);
    }
    result.Set("full_attn_spans", spans);
  }
  Array<Array<std::int64_t>> ranges;
  for (const QueryRange& range : fields.query_ranges) {
    ranges.push_back({range.local_start, range.local_end, range.global_start});
  }
  result.Set("query_ranges", ranges);
  return result;
}

void define_metadata() {
  refl::ObjectDef<AttentionMetadataObj>();
  refl::GlobalDef()
      .def("ditattn.make_metadata", make_metadata)
      .def("ditattn.metadata_fields", metadata_fields)
      .def("ditattn.mask_kind", [](const AttentionMetadata& metadata) {
        switch (metadata->mask_description().kind) {
          case MaskDescription::Kind::none:
            return String("none");
          case MaskDescription::Kind::key_prefix:
            return String("key_prefix");
          case MaskDescription::Kind::dense:
            break;
        }
        return String("dense");
      });
}

// --- Selection --------------------------------------------------------------------------------------------------

Any spec_dict(const std::optional<AttentionSpec>& spec) {
  if (!spec) return {};
  const char* const policies[] = {"error", "warn", "allow"};
  return Dict{{"backend", String(spec->backend)},
              {"backend_kwargs", spec->backend_kwargs},
              {"on_unusable", spec->on_unusable ? Any(String(policies[static_cast<int>(*spec->on_unusable)])) : Any()},
              {"allowed", strings(spec->allowed)},
              {"max_error", spec->max_error ? Any(*spec->max_error) : Any()}};
}

// {"default": spec or None, "per_role": {role: spec}}, of a configuration's JSON text or file.
Dict parse_config(const String& text, bool may_be_file) {
  const AttentionConfig config =
      may_be_file ? AttentionConfig::from_json_or_file(text) : AttentionConfig::from_json(text);
  Dict per_role;
  for (const auto& [role, spec] : config.per_role) per_role.Set(role, spec_dict(spec));
  return {{"default", spec_dict(config.default_spec)}, {"per_role", per_role}};
}

Dict selection_dict(const Selection& selection) {
  return {{"member", String(selection.member.name())},
          {"backend", to_python(selection.backend)},
          {"spec", spec_dict(selection.spec)},
          {"source", String(selection.source)},
          {"is_explicit", selection.is_explicit}};
}

Dict explanation_dict(const Explanation& explanation) {
  Array<Any> members;
  for (const MemberVerdict& answer : explanation.members) {
    members.push_back(Dict{{"member", String(answer.member.name())},
                           {"is_candidate", answer.is_candidate},
                           {"engine", String(answer.backend ? answer.backend->capabilities().engine : "")},
                           {"kernel", String(answer.kernel)},
                           {"tuned", answer.tuned ? Any(tuned_result_dict(*answer.tuned)) : Any()},
                           {"reasons", strings(answer.verdict.reasons)}});
  }
  return {{"source", String(explanation.source)},
          {"is_explicit", explanation.is_explicit},
          {"members", members},
          {"chosen", explanation.chosen ? Any(String(explanation.chosen->name())) : Any()},
          {"why", String(explanation.why)}};
}

void define_selection() {
  refl::GlobalDef()
      .def("ditattn.explain_choice",
           [](const Dict& problem, const String& role, const Dict& config, const String& category) {
             return explanation_dict(explain(problem_from(problem), role, config_from(config), category));
           })
      .def("ditattn.parse_config", parse_config)
      .def("ditattn.get_attn_backend_for_role",
           [](const String& role, std::int64_t head_size, const Dict& config, const String& category,
              const String& device) {
             return selection_dict(get_attn_backend_for_role(role, head_size, config_from(config), category, device));
           })
      .def("ditattn.select_backend",
           [](const Dict& problem, const String& role, const Dict& config, const String& category) {
             return selection_dict(select_backend(problem_from(problem), role, config_from(config), category));
           })
      .def("ditattn.platform_candidates",
           [](const String& device) { return names_of(platform_candidates(std::string(device))); })
      .def("ditattn.define_platform", [](const String& device, const Array<String>& names) {
        std::vector<Enum> members;
        for (const String& name : names) members.push_back(Enum::from_name(std::string(name)));
        define_platform(device, std::move(members));
      });
}

// --- Tensors and the rest ---------------------------------------------------------------------------------------

// The same memory as elements of another dtype of the same size. For dtypes an array library cannot hand over.
Tensor reinterpret(const Tensor& tensor, DLDataType dtype) {
  if (dtype.bits != tensor.dtype().bits) {
    throw ValueError("Elements of " + dtype_name(tensor.dtype()) + " cannot be taken for " + dtype_name(dtype) + ".");
  }
  struct Shared {  // keeps `tensor` alive, and is what tvm-ffi calls an allocator of memory that is there already
    Tensor base;
    void AllocData(DLTensor* made) { made->data = data_pointer(base); }
    void FreeData(DLTensor* /*made*/) {}
  };
  const tvm::ffi::Shape shape(tensor.shape().begin(), tensor.shape().end());
  const tvm::ffi::Shape strides(tensor.strides().begin(), tensor.strides().end());
  return Tensor::FromNDAllocStrided(Shared{tensor}, shape, strides, dtype, tensor.device());
}

void copy_rows(const Tensor& from, const Tensor& to, int dimension, const char* source, char* target) {
  const std::int64_t size = from.dtype().bits / 8;
  const std::int64_t count = from.size(dimension);
  const std::int64_t step_from = from.stride(dimension) * size;
  const std::int64_t step_to = to.stride(dimension) * size;
  if (dimension == from.ndim() - 1 && step_from == size && step_to == size) {
    std::memcpy(target, source, static_cast<std::size_t>(count * size));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i, source += step_from, target += step_to) {
    if (dimension == from.ndim() - 1) {
      std::memcpy(target, source, static_cast<std::size_t>(size));
    } else {
      copy_rows(from, to, dimension + 1, source, target);
    }
  }
}

// Copies what a backend written in Python returned, once it has the shape, dtype and device that are due.
void copy_result(const Tensor& from, const Tensor& to, const String& what) {
  const auto describe = [](const Tensor& t) {
    return dtype_name(t.dtype()) + " " + shape_name(t) + " on " + device_name(t.device());
  };
  if (describe(from) != describe(to)) {
    throw ValueError(std::string(what) + " is " + describe(from) + ", expected " + describe(to) + ".");
  }
  if (to.device().device_type != kDLCPU) throw NotImplementedError("Only host tensors can be copied here.");
  if (from.numel() == 0) return;
  copy_rows(from, to, 0, static_cast<const char*>(data_pointer(from)), static_cast<char*>(data_pointer(to)));
}

// Where libditattn.so lies.
String folder_of_library() {
  Dl_info info;
  if (::dladdr(reinterpret_cast<const void*>(&num_threads), &info) == 0 || info.dli_fname == nullptr) {
    throw FileError("The file of libditattn is not known to the dynamic linker.");
  }
  return std::filesystem::absolute(info.dli_fname).parent_path().string();
}

void define_rest() {
  refl::GlobalDef()
      .def("ditattn.reinterpret", reinterpret)
      .def("ditattn.copy_result", copy_result)
      .def("ditattn.launch_counts",
           [] {
             Array<Dict> counts;
             for (const LaunchCount& count : launch_counts()) {
               counts.push_back(Dict{{"role", String(count.role)},
                                     {"backend", String(count.backend)},
                                     {"calls", static_cast<std::int64_t>(count.calls)}});
             }
             return counts;
           })
      .def("ditattn.reset_launch_counts", reset_launch_counts)
      .def("ditattn.num_threads", [] { return static_cast<std::int64_t>(num_threads()); })
      .def("ditattn.set_num_threads", [](int count) { set_num_threads(count); })
      .def("ditattn.version", [] { return String(DITATTN_VERSION); })
      .def("ditattn.interface_version", [] { return static_cast<std::int64_t>(DITATTN_INTERFACE_VERSION); })
      .def("ditattn.folder_of_library", folder_of_library);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  define_registry();
  define_backends();
  define_metadata();
  define_selection();
  define_rest();
}

}  // namespace
}  // namespace ditattn::python
