#include "ditattn/attention.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <functional>
#include <mutex>
#include <shared_mutex>
#include <string_view>
#include <unordered_map>

#include "core/environment.hpp"
#include "core/fork_locks.hpp"
#include "core/text.hpp"
#include "ditattn/errors.hpp"
#include "ditattn/selector.hpp"
#include "registry/check_tensor.hpp"
#include "registry/enum.hpp"

namespace ditattn {
namespace {

using Layer = std::shared_ptr<const AttentionImpl>;

// All that a layer depends on beside the registrations. A class is kept alive by its layer: its address is its own.
struct Numbers {
  const AttentionBackend* backend_class;
  std::optional<double> softmax_scale;
  std::optional<double> max_error;
  bool causal;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_size;

  bool operator==(const Numbers&) const = default;
};

// With strings to keep, with views to look up, which every call does: backend and role first, which differ between the
// layers of a model; then the role's category, the environment's backend, options, configuration and device.
template <class Text>
struct Key {
  Numbers numbers;
  std::array<Text, 7> texts;
};
using KeptKey = Key<std::string>;
using SoughtKey = Key<std::string_view>;

KeptKey to_keep(const SoughtKey& key) {
  KeptKey kept{.numbers = key.numbers, .texts = {}};
  std::ranges::copy(key.texts, kept.texts.begin());
  return kept;
}

struct SameKey {
  using is_transparent = void;
  template <class A, class B>
  bool operator()(const Key<A>& a, const Key<B>& b) const {
    return a.numbers == b.numbers && std::ranges::equal(a.texts, b.texts);
  }
};

struct KeyHash {
  using is_transparent = void;
  template <class Text>
  std::size_t operator()(const Key<Text>& key) const {
    std::size_t seed = 0;
    const auto mix = [&](const auto& value) {
      seed = seed * 1'000'003 + std::hash<std::decay_t<decltype(value)>>()(value);
    };
    mix(key.numbers.backend_class);
    mix(key.numbers.num_heads);
    mix(key.numbers.head_size);
    mix(std::string_view(key.texts[0]));
    mix(std::string_view(key.texts[1]));
    return seed;
  }
};

using KeptLayers = std::unordered_map<KeptKey, Layer, KeyHash, SameKey>;

struct Layers {
  std::shared_mutex mutex;
  std::uint64_t changes = 0;  // registrations when these were made
  KeptLayers kept;
};

Layers& layers() {
  static auto& instance = *new Layers;  // never destroyed: plug-ins' objects are in it
  [[maybe_unused]] static const bool held = hold_over_fork(instance.mutex);
  return instance;
}

constexpr std::size_t kMostKept = 512;  // more than models have kinds of layers; then all are made anew

// Options as one text that differs where they do; none for values that cannot be compared.
std::optional<std::string> text_of(const BackendKwargs& kwargs) {
  std::string text;
  if (kwargs.empty()) return text;
  for (const auto& [key, value] : kwargs) {
    std::string entry;
    if (const auto flag = value.as<bool>()) {
      entry = *flag ? "true" : "false";
    } else if (const auto integer = value.as<std::int64_t>()) {
      entry = fmt::format("{}", *integer);
    } else if (const auto number = value.as<double>()) {
      entry = fmt::format("{:a}", *number);
    } else if (const auto string = value.as<tvm::ffi::String>()) {
      entry = "\"" + std::string(*string);
    } else {
      return std::nullopt;
    }
    text += fmt::format("{}:{}={}:{};", key.size(), std::string(key), entry.size(), entry);
  }
  return text;
}

// A configuration as one text that differs where they do.
std::optional<std::string> text_of(const AttentionConfig& config) {
  std::string text;
  if (!config.default_spec && config.per_role.empty()) return text;
  const auto add = [&](const std::string& role, const AttentionSpec& spec) {
    const auto kwargs = text_of(spec.backend_kwargs);
    text += fmt::format("{}:{}={};{};{};{};{};", role.size(), role, spec.backend, kwargs.value_or(""),
                        spec.on_unusable ? static_cast<int>(*spec.on_unusable) : -1, fmt::join(spec.allowed, ","),
                        spec.max_error ? fmt::format("{:a}", *spec.max_error) : "");
    return kwargs.has_value();
  };
  if (config.default_spec && !add("", *config.default_spec)) return std::nullopt;
  text += '\n';
  for (const auto& [role, spec] : config.per_role) {
    if (!add(role, spec)) return std::nullopt;
  }
  return text;
}

bool names_nobody(const AttentionOptions& options) {
  return options.backend_class == nullptr && same_name(options.backend, kAutomatic);
}

// The configuration, with the call's own bound where it has no default.
AttentionConfig config_of(const AttentionOptions& options) {
  AttentionConfig config = options.config;
  if (options.max_error) {
    if (!config.default_spec) config.default_spec.emplace();
    if (config.default_spec->is_automatic() && !config.default_spec->max_error) {
      config.default_spec->max_error = options.max_error;
    }
  }
  return config;
}

void check_max_error(const AttentionOptions& options) {
  if (!options.max_error) return;
  if (!(*options.max_error >= 0)) {
    throw ValueError(fmt::format("max_error is {}, expected a number from 0 on.", *options.max_error));
  }
  if (!names_nobody(options)) {
    throw ValueError(fmt::format("max_error bounds the choice of backend \"auto\", but the backend is {}.",
                                 options.backend_class ? options.backend_class->get_name() : options.backend));
  }
}

Layer make(const AttentionOptions& options, const LayerShape& shape) {
  BackendClass backend = options.backend_class;
  BackendKwargs kwargs = options.backend_kwargs;
  check_max_error(options);
  if (names_nobody(options)) {
    const Selection selection = get_attn_backend_for_role(options.role, shape.head_size, config_of(options),
                                                          options.role_category, shape.device);
    backend = selection.backend;
    kwargs = selection.backend_kwargs();
    for (const auto& [key, value] : options.backend_kwargs) kwargs.Set(key, value);
  } else {
    if (backend == nullptr) {
      backend = DiffusionAttentionBackendEnum::from_name(upper_case(options.backend)).get_class();
    }
    backend->validate_available();
  }
  return backend->make({.num_heads = shape.num_heads,
                        .head_size = shape.head_size,
                        .softmax_scale = options.softmax_scale,
                        .causal = options.causal,
                        .num_kv_heads = shape.num_kv_heads,
                        .role = options.role,
                        .backend_kwargs = kwargs});
}

}  // namespace

Layer attention_layer(const AttentionOptions& options, const LayerShape& shape) {
  const bool is_free = names_nobody(options);
  const std::optional<std::string> kwargs = text_of(options.backend_kwargs);
  const std::optional<std::string> config = is_free ? text_of(options.config) : std::string();
  if (!kwargs || !config) return make(options, shape);
  const std::string environment_name =
      is_free ? environment(Env::DIFFUSION_ATTENTION_BACKEND).value_or("") : std::string();

  const SoughtKey key{.numbers = {.backend_class = options.backend_class.get(),
                                  .softmax_scale = options.softmax_scale,
                                  .max_error = options.max_error,
                                  .causal = options.causal,
                                  .num_heads = shape.num_heads,
                                  .num_kv_heads = shape.num_kv_heads,
                                  .head_size = shape.head_size},
                      .texts = {options.backend, options.role, options.role_category, environment_name, *kwargs,
                                *config, shape.device}};
  const std::uint64_t changes = registration_changes();
  Layers& all = layers();
  {
    const std::shared_lock lock(all.mutex);
    if (all.changes == changes) {
      if (const auto found = all.kept.find(key); found != all.kept.end()) return found->second;
    }
  }
  Layer made = make(options, shape);  // may load a plug-in, which may come back here: no lock is held
  KeptLayers dropped;                 // destroyed when the lock is free again, for the same reason
  const std::unique_lock lock(all.mutex);
  if (all.changes != changes || all.kept.size() == kMostKept) all.kept.swap(dropped);
  all.changes = changes;
  all.kept.emplace(to_keep(key), made);
  return made;
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionOptions& options,
                 const AttentionMetadata& metadata, const ForwardOutputs& outputs) {
  check_rank_4("query", query);
  check_rank_4("key", key);
  const Layer layer = attention_layer(options, {.num_heads = query.size(2),
                                                .num_kv_heads = key.size(2),
                                                .head_size = query.size(3),
                                                .device = std::string(device_type_name(query.device()))});
  return layer->forward(query, key, value, metadata, outputs);
}

}  // namespace ditattn
