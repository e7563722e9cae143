#include "registry/table_backend.hpp"

#include <fmt/format.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>

#include "ditattn/plugin.hpp"
#include "ditattn/version.hpp"

namespace ditattn {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Map;
using tvm::ffi::Optional;
using tvm::ffi::String;
using Table = Map<String, Any>;

std::vector<std::string> from_array(const Array<String>& array) { return {array.begin(), array.end()}; }

template <class T>
Optional<T> to_optional(const std::optional<T>& value) {
  return value ? Optional<T>(*value) : Optional<T>();
}

// The entry `key` of a map, or `fallback`.
template <class T>
T get_or(const Table& map, const char* key, T fallback) {
  const auto value = map.Get(String(key));
  return value ? value->template cast<T>() : fallback;
}

class TableImpl final : public AttentionImpl {
 public:
  TableImpl(const ImplConfig& config, Function forward, std::string origin)
      : AttentionImpl(config), forward_(std::move(forward)), origin_(std::move(origin)) {}

  void run(const AttentionCall& call) const override {
    guard(origin_, [&] {
      forward_(call.query, call.key, call.value, call.out,
               call.lse.defined() ? Optional<Tensor>(call.lse) : Optional<Tensor>(), call.metadata);
    });
  }

 private:
  Function forward_;
  std::string origin_;
};

class TableBackend final : public AttentionBackend {
 public:
  TableBackend(const Table& table, std::string origin)
      : origin_(std::move(origin)),
        validate_available_(function(table, "validate_available")),
        explain_(function(table, "explain")),
        kernel_name_(optional_function(table, "kernel_name")),
        create_(function(table, "create")) {
    guard(origin_, [&] {
      name_ = std::string(function(table, "get_name")().cast<String>());
      capabilities_ = capabilities_from_map(function(table, "capabilities")().cast<Table>());
      known_kwargs_ = from_array(function(table, "known_kwargs")().cast<Array<String>>());
    });
  }

  [[nodiscard]] std::string get_name() const override { return name_; }
  [[nodiscard]] const Capabilities& capabilities() const override { return capabilities_; }
  void validate_available() const override {
    guard(origin_, [&] { validate_available_(); });
  }
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    return guard(origin_, [&] {
      const Any reasons = ask(explain_, problem);
      return reasons == nullptr ? Verdict{} : Verdict{from_array(reasons.cast<Array<String>>())};
    });
  }
  [[nodiscard]] std::string kernel_name(const Problem& problem) const override {
    if (!kernel_name_) return {};
    return guard(origin_, [&] { return std::string(ask(*kernel_name_, problem).cast<String>()); });
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    Function forward = guard(origin_, [&] {
      return create_(config.num_heads, config.head_size, to_optional(config.softmax_scale), config.causal,
                     to_optional(config.num_kv_heads), String(config.prefix), config.backend_kwargs)
          .cast<Function>();
    });
    if (forward == nullptr) throw Error("RuntimeError", origin_ + ": its function 'create' returned no function");
    return std::make_unique<TableImpl>(config, std::move(forward), origin_);
  }
  [[nodiscard]] std::vector<std::string> known_kwargs() const override { return known_kwargs_; }

 private:
  static Any ask(const Function& function, const Problem& p) {
    return function(p.batch, p.num_heads, p.num_kv_heads, p.seq_q, p.seq_kv, p.head_size, p.dtype, p.device,
                    static_cast<std::int64_t>(p.mask), problem_features(p), p.alignment);
  }

  static std::optional<Function> optional_function(const Table& table, const char* name) {
    const auto entry = table.Get(String(name));
    return entry && *entry != nullptr ? entry->as<Function>() : std::nullopt;  // None is a Function too, a null one
  }

  Function function(const Table& table, const char* name) const {
    const auto found = optional_function(table, name);
    if (!found) throw ImportError(fmt::format("{}: its table has no function '{}'", origin_, name));
    return *found;
  }

  std::string origin_;
  std::string name_;
  Capabilities capabilities_;
  std::vector<std::string> known_kwargs_;
  Function validate_available_;
  Function explain_;
  std::optional<Function> kernel_name_;
  Function create_;
};

}  // namespace

Array<String> to_array(const std::vector<std::string>& texts) {
  Array<String> result;
  for (const std::string& text : texts) result.push_back(String(text));
  return result;
}

BackendClass backend_from_table(const Any& table, const std::string& origin) {
  const auto functions = table.as<Table>();
  if (!functions) throw ImportError(fmt::format("{}: ditattn_backend did not return a table of functions", origin));
  const auto entry = functions->Get(String("interface_version"));
  const auto version = entry ? entry->as<std::int64_t>() : std::nullopt;
  if (version != DITATTN_INTERFACE_VERSION) {
    throw ImportError(fmt::format("{}: it was built for interface version {}, this library has version {}. Rebuild it.",
                                  origin, version ? std::to_string(*version) : "(none)", DITATTN_INTERFACE_VERSION));
  }
  return std::make_shared<TableBackend>(*functions, origin);
}

Table capabilities_to_map(const Capabilities& can) {
  Array<String> dtypes;
  for (DLDataType dtype : can.dtypes) dtypes.push_back(String(dtype_name(dtype)));
  return Table{{"engine", String(can.engine)},
               {"devices", to_array(can.devices)},
               {"dtypes", dtypes},
               {"head_sizes", Array<std::int64_t>(can.head_sizes.list.begin(), can.head_sizes.list.end())},
               {"head_size_min", can.head_sizes.min},
               {"head_size_max", can.head_sizes.max},
               {"head_size_multiple", can.head_sizes.multiple},
               {"masks", to_array(can.masks)},
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

Capabilities capabilities_from_map(const Table& map) {
  Capabilities can;
  can.engine = std::string(get_or(map, "engine", String()));
  can.devices = from_array(get_or(map, "devices", Array<String>()));
  for (const String& name : get_or(map, "dtypes", Array<String>()))
    can.dtypes.push_back(parse_dtype(std::string(name)));
  for (std::int64_t size : get_or(map, "head_sizes", Array<std::int64_t>())) can.head_sizes.list.push_back(size);
  can.head_sizes.min = get_or<std::int64_t>(map, "head_size_min", 1);
  can.head_sizes.max = get_or<std::int64_t>(map, "head_size_max", 0);
  can.head_sizes.multiple = std::max<std::int64_t>(get_or<std::int64_t>(map, "head_size_multiple", 1), 1);
  can.masks = from_array(get_or(map, "masks", Array<String>()));
  can.gqa = get_or(map, "gqa", false);
  can.causal = get_or(map, "causal", false);
  can.causal_alignment =
      get_or(map, "causal_top_left", false) ? CausalAlignment::top_left : CausalAlignment::bottom_right;
  can.lse = get_or(map, "lse", false);
  can.packed = get_or(map, "packed", false);
  can.joint = get_or(map, "joint", false);
  can.fp8_kv = get_or(map, "fp8_kv", false);
  can.graph_safe = get_or(map, "graph_safe", false);
  can.masked_nan_propagates = get_or(map, "masked_nan_propagates", false);
  can.alignment = get_or<std::int64_t>(map, "alignment", 1);
  return can;
}

}  // namespace ditattn
