#include "tools/ditattn/inputs.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "ditattn/cuda.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "ditattn/safetensors.hpp"
#include "registry/check_any_call.hpp"
#include "tools/ditattn/output.hpp"
#include "tuner/random_call.hpp"

namespace ditattn::cli {
namespace {

using Tensors = std::map<std::string, Tensor>;

constexpr const char* kRequired[] = {"query", "key", "value"};
constexpr const char* kOptional[] = {"attn_mask",    "joint_query",  "joint_key",    "joint_value", "joint_attn_mask",
                                     "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"};
constexpr std::size_t kNamesShown = 12;

bool contains(const auto& names, const std::string& name) {
  return std::ranges::any_of(names, [&](const char* known) { return name == known; });
}

// At most a dozen: a damaged or foreign file may hold thousands.
std::string names_of(const Tensors& tensors) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors) names.push_back(name);
  if (names.empty()) return "no tensors";
  const std::size_t more = names.size() - std::min(names.size(), kNamesShown);
  names.resize(names.size() - more);
  return fmt::format("{}{}", fmt::join(names, ", "), more > 0 ? fmt::format(" and {} more", more) : "");
}

// The longest sequence of cu_seqlens; 0 for what is no such tensor: the library then says what is wrong with it.
std::int64_t longest_sequence(const Tensor& offsets) {
  if (offsets.ndim() != 1 || offsets.dtype() != kInt32) return 0;
  const auto* data = static_cast<const std::int32_t*>(data_pointer(offsets));
  std::int64_t longest = 0;
  for (std::int64_t i = 1; i < offsets.numel(); ++i) {
    longest = std::max(longest, std::int64_t{data[i]} - std::int64_t{data[i - 1]});
  }
  return longest;
}

std::int64_t whole_number(const std::string& where, const std::string& name, const Tensor& tensor) {
  if (tensor.numel() != 1 || (tensor.dtype() != kInt32 && tensor.dtype() != kInt64)) {
    throw FileError(fmt::format("{}: '{}' is {} {}, expected one int32 or int64 number.", where, name,
                                dtype_name(tensor.dtype()), shape_name(tensor)));
  }
  return static_cast<std::int64_t>(load_element(data_pointer(tensor), 0, tensor.dtype()));
}

// What a file's metadata says of one case: the texts under `prefix` + key.
class Settings {
 public:
  Settings(const SafetensorsFile& file, std::string where, std::string prefix)
      : metadata_(file.metadata), where_(std::move(where)), prefix_(std::move(prefix)) {}

  [[nodiscard]] std::optional<std::string> text(const std::string& key) const {
    const auto found = metadata_.find(prefix_ + key);
    return found == metadata_.end() ? std::nullopt : std::optional(found->second);
  }

  /// The text as JSON of a type; FileError says what was `expected`.
  template <class T>
  [[nodiscard]] std::optional<T> get(const std::string& key, const char* expected) const {
    const std::optional<std::string> given = text(key);
    if (!given) return std::nullopt;
    try {
      return Json::parse(*given).get<T>();
    } catch (const Json::exception&) {
      throw FileError(fmt::format("{}: its metadata has {}='{}', expected {}.", where_, key, *given, expected));
    }
  }

 private:
  const std::map<std::string, std::string>& metadata_;
  std::string where_;
  std::string prefix_;
};

MetadataExtra make_extra(const std::string& where, const Tensors& tensors,
                         std::optional<std::int64_t> valid_kv_length) {
  MetadataExtra extra;
  for (const char* side : {"q", "k"}) {
    const std::string offsets = fmt::format("cu_seqlens_{}", side);
    const std::string longest = fmt::format("max_seqlen_{}", side);
    if (const auto found = tensors.find(offsets); found != tensors.end()) {
      extra.Set(offsets, found->second);
      extra.Set(longest, longest_sequence(found->second));
    }
    if (const auto found = tensors.find(longest); found != tensors.end()) {
      extra.Set(longest, whole_number(where, longest, found->second));
    }
  }
  if (valid_kv_length) extra.Set("valid_kv_length", *valid_kv_length);
  return extra;
}

void set_spans(AttentionMetadataFields& fields, const Settings& settings) {
  using Samples = std::vector<std::vector<std::array<std::int64_t, 2>>>;
  using Ranges = std::vector<std::array<std::int64_t, 3>>;
  const auto samples = settings.get<Samples>("full_attn_spans", "lists of [begin, end], one for each sample");
  if (!samples) return;
  fields.full_attn_spans.emplace();
  for (const auto& sample : *samples) {
    std::vector<Span>& spans = fields.full_attn_spans->emplace_back();
    for (const auto& [begin, end] : sample) spans.push_back({begin, end});
  }
  const auto ranges = settings.get<Ranges>("query_ranges", "a list of [local_start, local_end, global_start]");
  if (!ranges) return;
  for (const auto& [begin, end, global] : *ranges) fields.query_ranges.push_back({begin, end, global});
}

// Null where there is nothing to say.
AttentionMetadata make_metadata(const std::string& where, const Tensors& tensors, const Settings& settings,
                                const CallOptions& options) {
  const auto optional = [&](const char* name) {
    const auto found = tensors.find(name);
    return found == tensors.end() ? tvm::ffi::Optional<Tensor>() : tvm::ffi::Optional<Tensor>(found->second);
  };
  std::optional<std::int64_t> valid_kv_length = options.valid_kv_length;
  if (!valid_kv_length) valid_kv_length = settings.get<std::int64_t>("valid_kv_length", "a whole number");
  const bool any = std::ranges::any_of(kOptional, [&](const char* name) { return tensors.contains(name); });
  if (!any && !valid_kv_length && !settings.text("full_attn_spans")) return {};
  AttentionMetadataFields fields{.attn_mask = optional("attn_mask"),
                                 .joint_query = optional("joint_query"),
                                 .joint_key = optional("joint_key"),
                                 .joint_value = optional("joint_value"),
                                 .joint_attn_mask = optional("joint_attn_mask"),
                                 .extra = make_extra(where, tensors, valid_kv_length)};
  fields.joint_strategy = options.joint_strategy.value_or(settings.text("joint_strategy").value_or("front"));
  set_spans(fields, settings);
  return AttentionMetadata(std::move(fields));
}

// `where` names the file, and the case in it, for messages.
Inputs make_inputs(const std::string& where, const Tensors& tensors, const Settings& settings,
                   const CallOptions& options) {
  for (const char* name : kRequired) {
    if (!tensors.contains(name)) {
      throw FileError(fmt::format("{} has no tensor '{}'. Expected query, key, value and optionally {}; it holds {}.",
                                  where, name, fmt::join(kOptional, ", "), names_of(tensors)));
    }
  }
  for (const auto& [name, tensor] : tensors) {
    if (!contains(kRequired, name) && !contains(kOptional, name)) {
      log(LogLevel::warning, fmt::format("{}: tensor '{}' is not used.", where, name));
    }
  }
  return {.query = tensors.at("query"),
          .key = tensors.at("key"),
          .value = tensors.at("value"),
          .metadata = make_metadata(where, tensors, settings, options),
          .softmax_scale = settings.get<double>("softmax_scale", "a number"),
          .causal = settings.get<bool>("causal", "true or false").value_or(false)};
}

// A file that is one case.
Inputs whole_file(const SafetensorsFile& file, const std::string& where, const CallOptions& options) {
  return make_inputs(where, file.tensors, Settings(file, where, ""), options);
}

std::string quoted(const std::filesystem::path& file) { return fmt::format("'{}'", file.string()); }

Tensor map_elements(const Tensor& like, DLDataType dtype, const auto& element) {
  Tensor result = empty({like.shape().data(), static_cast<std::size_t>(like.ndim())}, dtype);
  for (std::int64_t i = 0; i < result.numel(); ++i) store_element(result.data_ptr(), i, dtype, element(i));
  return result;
}

}  // namespace

Inputs load_inputs(const std::filesystem::path& file, const CallOptions& options) {
  return whole_file(load_safetensors(file), quoted(file), options);
}

std::vector<Case> load_cases(const std::filesystem::path& file, const CallOptions& options) {
  const SafetensorsFile content = load_safetensors(file);
  std::map<std::string, Tensors> groups;
  for (const auto& [name, tensor] : content.tensors) {
    const std::size_t dot = name.rfind('.');
    if (dot != std::string::npos) groups[name.substr(0, dot)].emplace(name.substr(dot + 1), tensor);
  }
  const std::string stem = file.stem().string();
  if (groups.empty() || content.tensors.contains("query")) return {{stem, whole_file(content, quoted(file), options)}};
  std::vector<Case> cases;
  for (const auto& [name, group] : groups) {
    const std::string where = fmt::format("Case '{}' of {}", name, quoted(file));
    const Settings settings(content, where, name + ".");
    cases.push_back({fmt::format("{}/{}", stem, name), make_inputs(where, group, settings, options),
                     place_of(stem, name, settings.text("layer"), settings.get<double>("timestep", "a number"))});
  }
  return cases;
}

Inputs random_inputs(const std::vector<std::int64_t>& shape, DLDataType dtype, std::uint64_t seed) {
  check_host_memory({.batch = shape[0],
                     .num_heads = shape[1],
                     .num_kv_heads = shape[1],
                     .seq_q = shape[2],
                     .seq_kv = shape[3],
                     .head_size = shape[4],
                     .dtype = dtype});
  NormalTensors normal(seed, dtype);
  const auto tensor = [&](std::int64_t tokens) { return normal.next({shape[0], tokens, shape[1], shape[4]}); };
  Inputs inputs;
  inputs.query = tensor(shape[2]);
  inputs.key = tensor(shape[3]);
  inputs.value = tensor(shape[3]);
  return inputs;
}

Inputs converted(const Inputs& inputs, DLDataType dtype) {
  const auto convert = [&](const Tensor& tensor) {
    if (tensor.dtype() == dtype) return tensor;
    const void* data = data_pointer(tensor);
    return map_elements(tensor, dtype, [&](std::int64_t i) { return load_element(data, i, tensor.dtype()); });
  };
  Inputs result = inputs;
  for (Tensor* tensor : {&result.query, &result.key, &result.value}) *tensor = convert(*tensor);
  if (inputs.metadata.defined()) {
    AttentionMetadataFields fields = inputs.metadata->fields;
    for (auto* joint : {&fields.joint_query, &fields.joint_key, &fields.joint_value}) {
      if (joint->has_value()) *joint = convert(joint->value());
    }
    result.metadata = AttentionMetadata(std::move(fields));
  }
  return result;
}

ImplConfig config_for(const Inputs& inputs) {
  const auto check_rank = [](const char* what, const Tensor& tensor) {
    if (tensor.ndim() != 4) {
      throw ValueError(fmt::format("{} must have 4 dimensions (batch, tokens, heads, head_size), got shape {}.", what,
                                   shape_name(tensor)));
    }
  };
  check_rank("query", inputs.query);
  check_rank("key", inputs.key);
  check_rank("value", inputs.value);
  return {.num_heads = inputs.query.size(2),
          .head_size = inputs.query.size(3),
          .softmax_scale = inputs.softmax_scale,
          .causal = inputs.causal,
          .num_kv_heads = inputs.key.size(2)};
}

Problem check_inputs(const Inputs& inputs, const ImplConfig& config) {
  return check_any_call(config, inputs.query, inputs.key, inputs.value, inputs.metadata);
}

Tensor allocate_out(const Problem& problem) {
  return empty(std::array{problem.batch, problem.seq_q, problem.num_heads, problem.head_size}, problem.dtype,
               problem.device);
}

Inputs inputs_on(const Inputs& inputs, DLDevice device) {
  Inputs result = inputs;
  for (Tensor* tensor : {&result.query, &result.key, &result.value}) *tensor = copy_to(*tensor, device);
  result.metadata = copy_to(inputs.metadata, device);
  return result;
}

}  // namespace ditattn::cli
