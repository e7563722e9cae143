#include "tools/ditattn/inputs.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "ditattn/errors.hpp"
#include "ditattn/log.hpp"
#include "ditattn/safetensors.hpp"

namespace ditattn::cli {
namespace {

using Tensors = std::map<std::string, Tensor>;

constexpr const char* kRequired[] = {"query", "key", "value"};
constexpr const char* kMask = "attn_mask";
constexpr const char* kNotSupportedYet[] = {"joint_query",     "joint_key",    "joint_value",
                                            "joint_attn_mask", "cu_seqlens_q", "cu_seqlens_k"};
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

// `where` names the file, and the case in it, for messages.
Inputs make_inputs(const std::string& where, const Tensors& tensors) {
  for (const char* name : kNotSupportedYet) {
    if (tensors.contains(name)) {
      throw NotImplementedError(
          fmt::format("{} holds '{}': joint and packed attention are not supported by this "
                      "version. Supported tensors: query, key, value, attn_mask.",
                      where, name));
    }
  }
  for (const char* name : kRequired) {
    if (!tensors.contains(name)) {
      throw FileError(
          fmt::format("{} has no tensor '{}'. Expected query, key, value and optionally attn_mask; it "
                      "holds {}.",
                      where, name, names_of(tensors)));
    }
  }
  for (const auto& [name, tensor] : tensors) {
    if (!contains(kRequired, name) && name != kMask) {
      log(LogLevel::warning, fmt::format("{}: tensor '{}' is not used.", where, name));
    }
  }
  Inputs inputs{.query = tensors.at("query"), .key = tensors.at("key"), .value = tensors.at("value"), .metadata = {}};
  if (const auto mask = tensors.find(kMask); mask != tensors.end()) {
    inputs.metadata = AttentionMetadata({.attn_mask = mask->second});
  }
  return inputs;
}

std::string quoted(const std::filesystem::path& file) { return fmt::format("'{}'", file.string()); }

Tensor map_elements(const Tensor& like, DLDataType dtype, const auto& element) {
  Tensor result = empty({like.shape().data(), static_cast<std::size_t>(like.ndim())}, dtype);
  for (std::int64_t i = 0; i < result.numel(); ++i) store_element(result.data_ptr(), i, dtype, element(i));
  return result;
}

void check_memory(const std::vector<std::int64_t>& s, DLDataType dtype) {
  const double elements = 2.0 * static_cast<double>(s[0]) * static_cast<double>(s[1]) *
                          (static_cast<double>(s[2]) + static_cast<double>(s[3])) * static_cast<double>(s[4]);
  const double bytes = elements * dtype.bits / 8;
  const double memory = static_cast<double>(::sysconf(_SC_PHYS_PAGES)) * static_cast<double>(::sysconf(_SC_PAGESIZE));
  if (bytes > memory) {
    throw MemoryError(
        fmt::format("Shape {} in {} needs {:.1f} GB for query, key, value and output; this machine has "
                    "{:.1f} GB.",
                    shape_name(s), dtype_name(dtype), bytes / 1e9, memory / 1e9));
  }
}

// A backend that takes everything and does nothing: the library's own checks of a call, without an engine behind them.
class CallChecker final : public AttentionBackend {
 public:
  explicit CallChecker(Problem& seen) : seen_(seen) {}
  [[nodiscard]] std::string get_name() const override { return "ditattn"; }
  [[nodiscard]] const Capabilities& capabilities() const override { return none_; }
  [[nodiscard]] Verdict explain(const Problem& problem) const override {
    seen_ = problem;
    return {};
  }

 protected:
  [[nodiscard]] std::unique_ptr<AttentionImpl> create(const ImplConfig& config) const override {
    class Nothing final : public AttentionImpl {
     public:
      using AttentionImpl::AttentionImpl;
      void run(const AttentionCall& /*call*/) const override {}
    };
    return std::make_unique<Nothing>(config);
  }

 private:
  Problem& seen_;
  Capabilities none_;
};

}  // namespace

Inputs load_inputs(const std::filesystem::path& file) {
  return make_inputs(quoted(file), load_safetensors(file).tensors);
}

std::vector<Case> load_cases(const std::filesystem::path& file) {
  const Tensors tensors = load_safetensors(file).tensors;
  std::map<std::string, Tensors> groups;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t dot = name.rfind('.');
    if (dot != std::string::npos) groups[name.substr(0, dot)].emplace(name.substr(dot + 1), tensor);
  }
  const std::string stem = file.stem().string();
  if (groups.empty() || tensors.contains("query")) return {{stem, make_inputs(quoted(file), tensors)}};
  std::vector<Case> cases;
  for (const auto& [name, group] : groups) {
    const std::string where = fmt::format("Case '{}' of {}", name, quoted(file));
    cases.push_back({fmt::format("{}/{}", stem, name), make_inputs(where, group)});
  }
  return cases;
}

Inputs random_inputs(const std::vector<std::int64_t>& shape, DLDataType dtype, std::uint64_t seed) {
  check_memory(shape, dtype);
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  const auto tensor = [&](std::int64_t tokens) {
    Tensor result = empty({shape[0], tokens, shape[1], shape[4]}, dtype);
    for (std::int64_t i = 0; i < result.numel(); ++i) store_element(result.data_ptr(), i, dtype, normal(generator));
    return result;
  };
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
  return {.query = convert(inputs.query),
          .key = convert(inputs.key),
          .value = convert(inputs.value),
          .metadata = inputs.metadata};
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
  return {.num_heads = inputs.query.size(2), .head_size = inputs.query.size(3), .num_kv_heads = inputs.key.size(2)};
}

Problem check_inputs(const Inputs& inputs, const ImplConfig& config, const ForwardOutputs& outputs) {
  Problem problem;
  const auto checker = std::make_shared<CallChecker>(problem);
  checker->make(config)->forward(inputs.query, inputs.key, inputs.value, inputs.metadata, outputs);
  return problem;
}

}  // namespace ditattn::cli
