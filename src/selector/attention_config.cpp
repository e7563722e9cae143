#include "ditattn/attention_config.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>
#include <tvm/ffi/container/array.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string_view>

#include "core/json_fields.hpp"
#include "core/text.hpp"

namespace ditattn {
namespace {

using Json = nlohmann::json;
using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Map;
using tvm::ffi::String;

// Deeper nesting is no configuration; and what is bounded needs no stack to speak of.
constexpr int kMaxDepth = 32;

// Keys that make an entry of `per_role` one choice, not a group of roles. All but three are vLLM-Omni's.
constexpr std::string_view kSpecKeys[] = {"backend",      "backend_kwargs",  "on_unusable",  "allowed",
                                          "max_error",    "quant",           "skip_softmax", "fastvideo_vsa_topk",
                                          "block_sparse", "skip_calibration"};

// Python's names of types: the messages are vLLM-Omni's.
const char* type_name(const Json& json) {
  if (json.is_null()) return "NoneType";
  if (json.is_boolean()) return "bool";
  if (json.is_number_float()) return "float";
  if (json.is_number()) return "int";
  if (json.is_string()) return "str";
  return json.is_array() ? "list" : "dict";
}

bool is_spec_key(const std::string& key) { return std::ranges::find(kSpecKeys, key) != std::end(kSpecKeys); }

bool has_spec_key(const Json& entry) {
  return std::ranges::any_of(entry.items(), [](const auto& item) { return is_spec_key(item.key()); });
}

Any to_any(const Json& json) {
  if (json.is_boolean()) return json.get<bool>();
  if (json.is_number_float()) return json.get<double>();
  if (json.is_number_unsigned() && json.get<std::uint64_t>() > INT64_MAX) {
    throw ConfigError(fmt::format("AttentionConfig has the number {}, which is beyond {}.", shown(json), INT64_MAX));
  }
  if (json.is_number()) return json.get<std::int64_t>();
  if (json.is_string()) return String(json.get<std::string>());
  if (json.is_array()) {
    Array<Any> array;
    for (const Json& element : json) array.push_back(to_any(element));
    return array;
  }
  if (!json.is_object()) return {};
  Map<String, Any> map;
  for (const auto& [key, value] : json.items()) map.Set(String(key), to_any(value));
  return map;
}

// A name as configurations give it; none for null and "auto".
std::optional<std::string> parse_name(const Json& name, const char* what) {
  if (name.is_null()) return std::nullopt;
  if (!name.is_string()) throw ConfigError(fmt::format("Expected str for {}, got {}", what, type_name(name)));
  std::string text = upper_case(name.get<std::string>());
  if (text.empty()) throw ConfigError(fmt::format("{} is an empty string. Give a backend's name, or 'auto'.", what));
  return text == "AUTO" ? std::nullopt : std::optional(text);
}

// What a choice may be moved to, and when.
void parse_policy(const Json& entry, AttentionSpec& spec) {
  const auto given = [&](const char* key) { return entry.contains(key) && !entry[key].is_null(); };
  if (given("on_unusable")) {
    const Json& policy = entry["on_unusable"];
    if (policy == "error") {
      spec.on_unusable = OnUnusable::error;
    } else if (policy == "warn") {
      spec.on_unusable = OnUnusable::warn;
    } else if (policy == "allow") {
      spec.on_unusable = OnUnusable::allow;
    } else {
      throw ConfigError(
          fmt::format("AttentionSpec.on_unusable is {}. Valid values are: error, warn, allow", shown(policy)));
    }
  }
  if (given("allowed")) {
    if (!entry["allowed"].is_array() || entry["allowed"].empty()) {
      throw ConfigError(
          fmt::format("AttentionSpec.allowed is {}, expected a list of backends' names. Without it, the "
                      "platform's order is meant.",
                      shown(entry["allowed"])));
    }
    for (const Json& name : entry["allowed"]) {
      const auto parsed = parse_name(name, "AttentionSpec.allowed");
      if (!parsed) throw ConfigError("AttentionSpec.allowed has no backend in one of its places. Name backends.");
      spec.allowed.push_back(*parsed);
    }
    if (!spec.is_automatic() && spec.on_unusable.value_or(OnUnusable::error) == OnUnusable::error) {
      throw ConfigError(
          fmt::format("AttentionSpec.allowed is given, but {} is never replaced. Set on_unusable to "
                      "\"warn\" or \"allow\".",
                      spec.backend));
    }
  }
  if (given("max_error")) {
    const Json& bound = entry["max_error"];
    if (!bound.is_number() || !(bound.get<double>() >= 0)) {
      throw ConfigError(fmt::format("AttentionSpec.max_error is {}, expected a number from 0 on.", shown(bound)));
    }
    if (!spec.is_automatic()) {
      throw ConfigError(fmt::format("AttentionSpec.max_error is for backend \"auto\", but backend={}", spec.backend));
    }
    spec.max_error = bound.get<double>();
  }
}

// vLLM-Omni's keys for backends that are not here, or for FLASHINFER_ATTN.
void parse_upstream_options(const Json& entry, AttentionSpec& spec) {
  const auto given = [&](const char* key) {
    return entry.contains(key) && !entry[key].is_null() && entry[key] != Json(false);
  };
  if (given("quant")) {
    if (spec.backend != "FLASHINFER_ATTN") {
      throw ConfigError(fmt::format(
          "quant is only supported by the TRTLLM_ATTN and FLASHINFER_ATTN backends, but backend={}", spec.backend));
    }
    spec.backend_kwargs.Set("quant", to_any(entry["quant"]));
  }
  if (given("skip_softmax")) {
    throw ConfigError(
        fmt::format("skip_softmax is only supported by the TRTLLM_ATTN backend, but backend={}", spec.backend));
  }
  for (const char* key : {"fastvideo_vsa_topk", "block_sparse", "skip_calibration"}) {
    if (given(key)) {
      throw ConfigError(fmt::format("{} belongs to a backend that ditattn does not have, but backend={}. Remove it.",
                                    key, spec.backend));
    }
  }
}

// One choice: a name, or an object of spec keys. None: not set.
std::optional<AttentionSpec> parse_spec(const Json& entry, const std::string& where) {
  if (entry.is_string() || entry.is_null()) {
    const auto name = parse_name(entry, "AttentionSpec.backend");
    return name ? std::optional(AttentionSpec{.backend = *name}) : std::nullopt;
  }
  if (!entry.is_object()) {
    throw ConfigError(fmt::format("Expected str or dict for {}, got {}", where, type_name(entry)));
  }
  if (entry.empty()) throw ConfigError(fmt::format("Empty entry for {}", where));
  for (const auto& [key, value] : entry.items()) {
    if (!is_spec_key(key)) {
      throw ConfigError(
          fmt::format("Unknown key '{}' in {}. Valid keys are: {}", key, where, fmt::join(kSpecKeys, ", ")));
    }
  }
  const auto name = parse_name(entry.contains("backend") ? entry["backend"] : Json(), "AttentionSpec.backend");
  AttentionSpec spec{.backend = name.value_or(kAutomatic)};
  parse_policy(entry, spec);
  if (!name) {
    const bool says_something = spec.on_unusable || !spec.allowed.empty() || spec.max_error;
    const bool is_for_one = std::ranges::any_of(entry.items(), [](const auto& item) {
      return item.key() != "backend" && item.key() != "on_unusable" && item.key() != "allowed" &&
             item.key() != "max_error" && !item.value().is_null();
    });
    if (is_for_one) {
      throw ConfigError(fmt::format("{} has options but no backend that they are for. Name one in 'backend'.", where));
    }
    return says_something ? std::optional(spec) : std::nullopt;
  }
  if (entry.contains("backend_kwargs") && !entry["backend_kwargs"].is_null()) {
    const Json& kwargs = entry["backend_kwargs"];
    if (!kwargs.is_object()) {
      throw ConfigError(fmt::format("Expected dict for AttentionSpec.backend_kwargs, got {}", type_name(kwargs)));
    }
    for (const auto& [key, value] : kwargs.items()) spec.backend_kwargs.Set(String(key), to_any(value));
  }
  parse_upstream_options(entry, spec);
  return spec;
}

// `entry` of the role `role`: one choice, or a group of nested roles.
void parse_role(const std::string& role, const Json& entry, std::map<std::string, AttentionSpec>& per_role) {
  if (role.empty() || role.front() == '.' || role.back() == '.' || role.find("..") != std::string::npos) {
    throw ConfigError(fmt::format("AttentionConfig.per_role has the role '{}': names must not be empty.", role));
  }
  if (entry.is_object() && entry.empty()) throw ConfigError(fmt::format("Empty per_role entry for role '{}'", role));
  if (entry.is_object() && !has_spec_key(entry)) {
    for (const auto& [key, value] : entry.items()) parse_role(fmt::format("{}.{}", role, key), value, per_role);
    return;
  }
  if (entry.is_object() &&
      !std::ranges::all_of(entry.items(), [](const auto& item) { return is_spec_key(item.key()); })) {
    throw ConfigError(fmt::format(
        "Invalid per_role entry for role '{}': cannot mix backend/skip_softmax with nested role keys.", role));
  }
  const auto spec = parse_spec(entry, fmt::format("the per_role entry for role '{}'", role));
  if (spec && !per_role.emplace(role, *spec).second) {
    throw ConfigError(fmt::format("AttentionConfig.per_role has role '{}' twice.", role));
  }
}

AttentionConfig parse_config(const Json& json) {
  if (!json.is_object()) throw ConfigError(fmt::format("Expected dict for AttentionConfig, got {}", type_name(json)));
  AttentionConfig config;
  for (const auto& [key, value] : json.items()) {
    if (key == "default") {
      config.default_spec = parse_spec(value, "AttentionConfig.default");
    } else if (key == "per_role") {
      if (value.is_null()) continue;
      if (!value.is_object()) {
        throw ConfigError(fmt::format("Expected dict for AttentionConfig.per_role, got {}", type_name(value)));
      }
      for (const auto& [role, entry] : value.items()) parse_role(role, entry, config.per_role);
    } else {
      throw ConfigError(fmt::format("Unknown key '{}' in AttentionConfig. Valid keys are: default, per_role", key));
    }
  }
  return config;
}

Json parse_json(const std::string& text, const std::string& origin) {
  const auto check_depth = [&](int depth, Json::parse_event_t, const Json&) {
    if (depth > kMaxDepth) {
      throw ConfigError(fmt::format("{} is nested deeper than {} levels.", origin, kMaxDepth));
    }
    return true;
  };
  try {
    return Json::parse(text, check_depth);
  } catch (const Json::exception& error) {
    throw ConfigError(fmt::format("{} is not JSON: {}", origin, error.what()));
  }
}

Json parse_json_or_file(const std::string& text_or_file) {
  const std::size_t first = text_or_file.find_first_not_of(" \t\r\n");
  if (first != std::string::npos && text_or_file[first] == '{') return parse_json(text_or_file, "AttentionConfig");
  std::error_code error;
  std::ifstream stream;
  if (std::filesystem::is_regular_file(text_or_file, error)) stream.open(text_or_file, std::ios::binary);
  const std::string text(std::istreambuf_iterator<char>(stream), {});
  if (!stream.is_open() || stream.bad()) {
    throw FileError(fmt::format(
        "Cannot read the AttentionConfig file '{}'. Give a JSON file, or the JSON itself, which begins with '{{'.",
        text_or_file));
  }
  return parse_json(text, fmt::format("AttentionConfig file '{}'", text_or_file));
}

// Sets `path` ("per_role.self.backend") in the document. A choice given by its name becomes an object on the way.
void apply_setting(Json& json, const std::string& path, const std::string& value) {
  if (std::ranges::count(path, '.') >= kMaxDepth) {
    throw ConfigError(
        fmt::format("--diffusion-attention-config.{:.40}… is nested deeper than {} levels.", path, kMaxDepth));
  }
  Json* node = &json;
  std::istringstream stream(path);
  for (std::string key; std::getline(stream, key, '.');) {
    if (node->is_string()) *node = Json{{"backend", *node}};
    if (!node->is_object() && !node->is_null()) {
      throw ConfigError(fmt::format("--diffusion-attention-config.{}: '{}' is not inside a dict.", path, key));
    }
    node = &(*node)[key];
  }
  *node = value;
}

}  // namespace

AttentionConfig AttentionConfig::from_json(const std::string& text) {
  return parse_config(parse_json(text, "AttentionConfig"));
}

AttentionConfig AttentionConfig::from_json_or_file(const std::string& text_or_file) {
  return parse_config(parse_json_or_file(text_or_file));
}

AttentionConfig config_from_flags(const AttentionFlags& flags) {
  Json json = flags.config.empty() ? Json::object() : parse_json_or_file(flags.config);
  for (const auto& [path, value] : flags.settings) apply_setting(json, path, value);
  AttentionConfig config = parse_config(json);
  if (flags.backend.empty()) return config;
  if (config.default_spec) {
    throw ConfigError(
        "--diffusion-attention-backend is mutually exclusive with --diffusion-attention-config.default.backend.");
  }
  config.default_spec = parse_spec(flags.backend, "--diffusion-attention-backend");
  return config;
}

}  // namespace ditattn
